"""What the scripts stand on: data, networks, training, results and tables, figures.

data.py       data sets, normalised once and kept on the device
networks.py   the paper's networks, with their feedback points
training.py   the training loop of one run
results.py    the folder of one run on disk
records.py    its JSON: checksums, and what it must hold
checkpoints.py
              tensors on disk
archives.py   npz files and checkpoints, read only where they are whole
tables.py     tables of many runs
figures.py    figures of many runs
report.py     both on one page, with the settings and every run
sweep.py      the scripts' options, and running experiments over seeds
files.py      files that are there whole or not at all
errors.py     what the user can mend
"""
