"""What is minimised: functions of tensors, without state, configs or files (DINOv2 section 4)."""
