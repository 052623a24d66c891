"""The pictures and clips that `seppo-fast score` generates: prompts, models, files, and who makes which."""
