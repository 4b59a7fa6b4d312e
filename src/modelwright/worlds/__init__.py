"""Generated testbeds whose truth is known exactly."""
