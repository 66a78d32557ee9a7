"""
Starts runs quickly: it has imported torch, and forks a child for each rank of a run that standard input
names, a JSON list [script, arguments, [[environment, file of stdout, file of stderr] of each rank]]; -> their
exit codes as JSON. A child is what `python script arguments` is, but for what takes a third of a tiny run's
time: sources are compiled once, loss.svg is not drawn, where nothing is compiled no FLOPs are counted before
the first step, and no sleep is longer than a second. Runs through run.sh do all of it.
"""
import atexit
import gc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path

gc.disable()  # until all is imported
for module in "numpy", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.checkpoint":
    importlib.import_module(module)
gc.freeze()  # or each child would walk, and so copy, all that it inherits
gc.enable()
atexit._clear()  # a child does at its end what it has asked for itself
COMPILED = {}

def compile_once(text, path):
    """-> the code of a source, which is remembered by its text and path."""
    if (text, path) not in COMPILED:
        COMPILED[text, path] = compile(text, path, "exec", dont_inherit=True)
    return COMPILED[text, path]

def run(script, arguments):
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    importlib.machinery.SourceFileLoader.source_to_code = lambda _, text, path: compile_once(text, path)
    plots = sys.modules["records.plots"] = types.ModuleType("records.plots")
    sys.modules["records"], plots.curve = types.ModuleType("records"), lambda *_: b"<svg/>"
    import harness
    warm_up = harness.Run.warm_up
    harness.Run.warm_up = lambda run, *more: (
        warm_up(run, *more) if run.args.compile else setattr(run, "executed", 1.0))
    sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 1))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = script
    exec(compile_once(Path(script).read_bytes(), script), vars(main))

def child(script, arguments, environment, stdout, stderr):
    """Ends this process with the code that the run ends with."""
    signal.alarm(300)  # if it hangs
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    code = 0
    try:
        run(script, arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # to take apart all that it has inherited would take a third of a tiny run's time

for line in sys.stdin:
    script, arguments, ranks = json.loads(line)
    for source in script, *(f"{os.path.dirname(script)}/{name}.py" for name in ("harness", "logbook")):
        compile_once(Path(source).read_bytes(), source)  # here, where the next children find it
    children = []
    for rank in ranks:
        if pid := os.fork():
            children.append(pid)
        else:
            child(script, arguments, *rank)
    codes = {}
    while len(codes) < len(children):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in children if status else ():  # one has failed: the others are ended, as torchrun does
            if other not in codes:
                os.kill(other, signal.SIGTERM)
    print(json.dumps([codes[pid] for pid in children]), flush=True)
