"""What the GPU kernels become on each architecture, found without a GPU: compiled ahead of time, read back.

``launch`` compiles what a launcher would launch, ``sass`` reads the machine code, ``bounds`` says what that
code must cost at least, ``cases`` lists the shapes, ``report`` makes a row of each kernel and compares
it with a budget. ``benchmarks/kernels_report.py`` is the command.
"""
