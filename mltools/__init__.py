"""Data, networks, training, results and tables: the modules that the scripts share.

data.py        data sets as tensors on the device, shuffled batches
layers.py      torch.nn's layers, faster; some take their SGD step in the backward pass
networks.py    the paper's networks, with their feedback points
release.py     the 2019 release's departures from DFA, for --protocol release
training.py    a run: its description, its training step, its loop over epochs
gpu.py         several runs on one GPU: streams, CUDA graphs
sweep.py       the command line, and the loop over experiments and seeds
progress.py    the progress of a sweep: a bar, lines, TensorBoard
results.py     the folder of a run: its files, its lock
logs.py        log lines, and their parser
tables.py      tables of experiments
figures.py     figures of experiments
report.py      one page of tables, figures, settings and runs; report.html is its template
bottleneck.py  the table, figures and report of the bottleneck sweep
errors.py      one-line error messages
"""
