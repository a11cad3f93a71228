"""A cluster of one machine for tests: sbatch, srun, squeue, sacct, scancel and scontrol as small programs on PATH.

`scancel --signal=USR2 JOB` does what happens ahead of a time limit, `scontrol requeue JOB` starts its script again once
it has ended. What they do not have: partitions, limits, nodes other than this one.
"""

import sys
from pathlib import Path

# Runs a batch script once for each index of its array, in the background; a file a job tells its state.
SBATCH = r"""
import json, os, re, subprocess, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
script = Path(sys.argv[1]).read_text()
(home / "scripts").mkdir(exist_ok=True)
number = 100 + len(list((home / "scripts").iterdir()))
saved = home / "scripts" / f"{number}.sh"
saved.write_text(script)
flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, flags=re.M))
array = re.match(r"0-(\d+)", flags["array"]) if "array" in flags else None
indices = range(int(array[1]) + 1) if array else [None]
for index in indices:
    job = f"{number}" if index is None else f"{number}_{index}"
    nodes, each = int(flags.get("nodes", 1)), int(flags.get("ntasks-per-node", 1))
    env = {"SLURM_JOB_ID": str(number * 100 + (index or 0)) if array else str(number),
           "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes),
           "SLURM_NTASKS": str(nodes * each), "SLURM_NTASKS_PER_NODE": str(each), "SLURM_JOB_NAME": "test",
           "FAKE_JOB": job, "FAKE_SCRIPT": str(saved)}
    if array:
        env |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
    log = open(home / f"{job}.log", "ab")
    process = subprocess.Popen(["bash", str(saved)], env={**os.environ, **env}, stdout=log, stderr=log,
                               start_new_session=True)
    (home / f"{job}.json").write_text(json.dumps(env))
    (home / f"{job}.pid").write_text(str(process.pid))
print(f"Submitted batch job {number}")
"""
SRUN = r"""
import os, re, subprocess, sys
words = sys.argv[1:]
pattern = words[words.index("--output") + 1]
command = words[next(i for i, word in enumerate(words) if "python" in word):]
job = os.environ["FAKE_JOB"]
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    env = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
           "SLURM_STEP_ID": "0"}
    path = pattern.replace("%A_%a", job).replace("%j", job).replace("%t", str(rank))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tasks.append(subprocess.Popen(command, env=env, stdout=open(path, "ab"), stderr=subprocess.STDOUT))
sys.exit(max(task.wait() for task in tasks))
"""
_ALIVE = r"""
import os, signal, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
jobs = {path.stem: int(path.read_text()) for path in home.glob("*.pid")}
"""
SQUEUE = _ALIVE + 'print("\\n".join(job for job, pid in jobs.items() if alive(pid)))'
SACCT = (
    _ALIVE
    + r"""
print("JobID|State|NodeList")
for job, pid in jobs.items():
    print(f"{job}|{'RUNNING' if alive(pid) else 'COMPLETED'}|localhost")
"""
)
SCANCEL = (
    _ALIVE
    + r"""
(job,) = (word for word in sys.argv[1:] if word in jobs)
number = [word.partition("=")[2] for word in sys.argv if word.startswith("--signal=")]
pid = jobs[job]
if alive(pid) and not number:
    os.killpg(pid, signal.SIGTERM)  # every process of the job, as slurmstepd does
elif alive(pid):  # the steps' processes alone, neither the batch script nor srun
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if os.getsid(int(path.name)) == pid != int(path.name) and not any(w.endswith(b"/srun") for w in words):
                os.kill(int(path.name), getattr(signal, f"SIG{number[0]}"))
        except OSError:
            pass
"""
)
SCONTROL = (
    _ALIVE
    + r"""
import json, subprocess
job = sys.argv[sys.argv.index("requeue") + 1]
env = json.loads((home / f"{job}.json").read_text())
code = f"while [ -d /proc/{jobs[job]} ] && ! grep -q '^State:.Z' /proc/{jobs[job]}/status; do sleep 0.1; done; "
log = open(home / f"{job}.log", "ab")
again = subprocess.Popen(["bash", "-c", code + "exec bash $FAKE_SCRIPT"], env={**os.environ, **env}, stdout=log,
                         stderr=log, start_new_session=True)
(home / f"{job}.pid").write_text(str(again.pid))
"""
)


def install(folder: Path) -> Path:
    """Write the programs into `folder`/bin; set FAKE_SLURM to `folder` and PATH to begin with what is returned."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, code in {
        "sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "sacct": SACCT, "scancel": SCANCEL, "scontrol": SCONTROL,
    }.items():  # fmt: skip
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o755)
    return programs
