"""From the rewards of samples to what a loss weighs them with."""
