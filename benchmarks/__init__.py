"""Drivers that measure explanations: faithfulness, localisation, speed. Imported as `vitexplain.benchmarks`."""
