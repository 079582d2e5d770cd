"""Training: data sets, teachers, students. The only room whose modules import torch at their top."""
