"""The experiments of launch/study.py.

sizes         what is run: cells, and how long each is
digits        the image task that most experiments share
table         live weights against averages, with clean and wrong labels
language      a small GPT on two ranks: constant learning rate, averages, decayed branches, a sweep
forgetting    fine-tune on other classes
distillation  soft targets and mean teacher, from few labels
resolution    train at one resolution, test at others
equivalence   every 16th step, twice the batch, compact shadows
work, files   processes, progress, and JSON that appears whole or not at all
results       what the cells left, and statistics over it
verdicts      sentences that follow from the numbers
plots, page   what is written from the results
"""
