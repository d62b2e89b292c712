"""Language models: PEFT's names on the same adapters."""
