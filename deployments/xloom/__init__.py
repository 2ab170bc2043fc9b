"""xloom: one base model, many LoRA adapters and their X-LoRA mixture, served with paged attention on Ray."""

__version__ = "0.1.0"
