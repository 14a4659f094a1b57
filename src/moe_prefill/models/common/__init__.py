"""What the families share: reading a config field by field, rotary parameters, tensor names."""
