"""Training: needs the extra ``vitexplain[train]``."""
