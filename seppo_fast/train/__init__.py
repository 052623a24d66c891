"""The trainer: `train` runs a whole training, or resumes one."""

from seppo_fast.train.loop import train as train
