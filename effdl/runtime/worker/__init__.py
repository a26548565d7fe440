"""One model in one fresh process, timed on request: JSON lines on stdin, JSON lines on stdout.

The package needs the standard library, numpy and onnxruntime only, and nothing else of effdl but
``runtime.machine``: ``runtime.bundle`` packs it into one file that any Python can run, here or on
another machine. Commands, each one line with the key ``do``:

    hello                                       versions, process id, providers, the machine
    load   model, providers, threads, feeds     opens the session and runs the first feed once
    block  runs or min_ms, start, cpu           times of single inferences in ns
    stats                                       peak resident memory
    quit

A refusal is ``{"error": KIND, "message": ...}`` with KIND one of ``command``, ``runtime`` (no usable
onnxruntime), ``provider``, ``load``, ``input``, ``run``. The process ends when stdin does, so it never
outlives whoever started it.
"""
