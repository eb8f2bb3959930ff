"""Measures of explanations; draw nothing, and import no method."""
