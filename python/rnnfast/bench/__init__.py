"""The benchmark behind `rnnfast bench`: rows, contenders, clocks and tables.

    rows.py      what one row is, its useful flops and its size class          suites.py   the rows
    arrays.py    the inputs of a row, the same in every process                floor.py    the time no program can beat
    rivals/      one file a library, the same verbs in each                    check.py    is the result right?
    worker.py    the child process of one contender                            contender.py  its handle in the parent
    probes.py    FMA peak, sgemm, read bandwidth                               machine.py  provenance
    session.py   check, calibrate and time row after row                       records.py   the JSON
    gpu.py       PyTorch's device, and cuDNN's regions                  clock.py    the host's, or events on the GPU
    summary.py   means and minima    report.py   on the terminal               plot.py      the picture

Nothing here is imported by `import rnnfast`, and a rival's process never loads the extension modules.
"""
