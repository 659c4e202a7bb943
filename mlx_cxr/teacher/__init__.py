"""The teacher: LFM2.5-VL read as a classifier of the 14 findings, adapted by LoRA; the only room with mlx-vlm."""
