"""Engines and journals; nothing here knows of distillation."""
