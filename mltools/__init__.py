"""The modules that the scripts stand on.

data.py        data sets as tensors on the device, shuffled batches
layers.py      torch.nn's layers, with their SGD step in the backward pass
networks.py    the paper's networks, with their feedback points
release.py     the 2019 release's departures from DFA, of --protocol release
training.py    a run: its description, its training step, its loop over epochs
gpu.py         several runs on one GPU: streams, CUDA graphs
sweep.py       the command line, and the loop over experiments and seeds
progress.py    the progress of a sweep: a bar, lines, TensorBoard
results.py     the folder of a run: its files, its lock
logs.py        the lines of logs, and results retrieved from them
tables.py      tables of experiments
figures.py     figures of experiments
report.py      tables, figures, settings and runs on one page, whose template is report.html
bottleneck.py  the table, figures and report of the bottleneck sweep
errors.py      errors in one line
"""
