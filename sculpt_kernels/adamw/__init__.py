"""AdamW steps whose gradient or whose applied update is projected."""
