"""What the scripts stand on: data, networks, training, results and tables, figures.

data.py         data sets, normalised once and kept on the device
layers.py       torch.nn's, with their SGD step in the backward pass
networks.py     the paper's networks, with their feedback points
training.py     the arithmetic of one run: steps, evaluation, alignment
capture.py      its steps as a CUDA graph
runs.py         one run on disk, from its start to its end
sweep.py        the scripts' options, and many runs, one after another or side by side
processes.py    the processes that torchrun spreads them over
progress.py     what is shown meanwhile
board.py        the same for TensorBoard
results.py      the folder of one run
records.py      its JSON: checksums, and what it must hold
logs.py         its log, and that of the 2019 release, written and read
checkpoints.py  its tensors
archives.py     npz files and checkpoints, read only where they are whole
files.py        files that are there whole or not at all
tables.py       tables of many runs
figures.py      figures of many runs
report.py       both on one page, with the settings and every run
errors.py       what ends a script, in one line
"""
