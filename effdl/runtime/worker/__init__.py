"""One model in one fresh process, timed on request: JSON lines on stdin, JSON lines on stdout.

The package needs the standard library, numpy and onnxruntime only, and nothing else of effdl but
``runtime.machine``: ``runtime.bundle`` packs it into one file that any Python can run, here or on
another machine. Commands, each one line with the key ``do``:

    hello                                       versions, process id, providers, the machine
    load   model, providers, threads, feeds,    opens the session and runs the first feed once; on a
           bind, cuda_graph                     GPU with data that stays there
    block  runs or min_ms, start, cpu           times of single inferences in ns
    trace  model, providers, threads, feeds,    opens a session that profiles; writes the graph as it
           graph, prefix, probe                 will be run; block runs it
    traced skip, trim                           ends profiling: mean time of every kernel
    run    model, providers, threads, feeds,    runs every feed once, writes the outputs to a file
           output, optimize
    room   path                                 free bytes of disk and memory
    digest path                                 SHA-256 of a file
    place  source, goal                         gives a file a second name
    remove path                                 removes a file or folder
    stats                                       memory here and on the GPU, energy of an inference
    quit

A refusal is ``{"error": KIND, "message": ...}`` with KIND one of ``command``, ``runtime`` (no usable
onnxruntime), ``provider``, ``load``, ``input``, ``graph`` (no CUDA graph), ``run``, ``file``,
``python`` (too old). The process ends when stdin does, so it never outlives whoever started it.
"""
