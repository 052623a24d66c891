"""The trainer: `train` runs a whole training, or resumes it."""

from seppo_fast.train.loop import train as train
