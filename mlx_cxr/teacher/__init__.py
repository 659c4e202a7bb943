"""The teacher: LFM2.5-VL read as a classifier of the 14 findings, adapted by LoRA; the only room with mlx-vlm."""

import os

# Transformers, of which the tokenizer alone is used, would say on each start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
