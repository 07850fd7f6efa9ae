"""mopd: multi-teacher on-policy distillation for tensor- and pipeline-parallel students."""

__version__ = "0.1.0"
