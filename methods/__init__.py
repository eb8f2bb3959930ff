"""One file a method; imported as `vitexplain.methods`, discovered by the registry."""
