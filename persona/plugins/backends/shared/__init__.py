"""What every backend does in the same way, without a framework: arrays are numpy at this border too."""
