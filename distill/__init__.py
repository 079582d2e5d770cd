"""Training: data sets, teachers, students. Its modules, like those of networks/, import torch at their top."""
