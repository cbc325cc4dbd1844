"""The training losses: functions of tensors, without state, configs or files (DINOv2 section 4)."""
