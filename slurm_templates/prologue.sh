# First lines of every stage's batch script, on the host, in the run's code folder. Sourced.
# Says which life this is, settles earlier ones that nobody saw the end of, and keeps the shell alive for the epilogue.

# At the time limit the batch shell gets SIGTERM, too; without this it dies before the epilogue.
trap : TERM

# In an array one task's SLURM_JOB_ID may be the array's own.
FT_JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
export FT_JOB="${FT_JOB:-$SLURM_JOB_ID}"
FT_LOG="$FT_RUN/slurm/$FT_STAGE/${FT_JOB}_0_log.out"
# Where stages share the job, Slurm gave this shell the first one's log.
[ -z "$FT_STAGES" ] || exec >>"$FT_LOG" 2>&1
# The lead of the warning before the time limit, in seconds, as this very job was submitted with it (FT_WARNING_S):
# the epilogue tells Slurm's warning from somebody's signal by that.
FT_WARNING_S=$(sed -n 's/^#SBATCH --signal=[^@]*@\([0-9]*\)$/\1/p' "$0" 2>/dev/null | tail -n 1)
export FT_WARNING_S
# The number of this stage's srun: it is the job's first unless another stage ran before it.
FT_STEP=$((${FT_STEP:--1} + 1))

# Lives share appended logs, one a rank: where this life's part begins.
ft_sizes="$(cd "$FT_RUN/slurm/$FT_STAGE" && stat -c %n:%s "${FT_JOB}"_*_log.out 2>/dev/null | tr '\n' ' ')"

# What follows in the log is of this start, also where it ends before it has an attempt (see ftlib/slurm/evidence.py).
echo "ftlib: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $FT_JOB, on ${SLURMD_NODENAME:-$(uname -n)}"

# The first number that nobody has taken: one file an attempt, created by one writer, and only by a job that may begin. A
# stopped or late job must not take a number, for the attempt that has the one before would leave.
FT_LIFE=1
while :; do
    [ ! -e "$FT_RUN/lives/$FT_STAGE-$FT_LIFE" ] || { FT_LIFE=$((FT_LIFE + 1)); continue; }
    # Before the first attempt, too: a sbatch that timed out may reach the controller after the run was cancelled.
    # Where nothing is printed, twice, the record cannot be read: the attempt begins, and finds out for itself.
    for ft_try in 1 2; do
        read -r ft_do ft_number <<END
$("$FT_PYTHON" -m ftlib.slurm.attempt begin "$FT_RUN" "$FT_STAGE" "$FT_LIFE" "$FT_JOB")
END
        [ -z "$ft_do" ] || break
    done
    [ "$ft_do" != exit ] || exit "$ft_number"
    (
        set -C
        printf '%s %s %s %s\n' "$FT_JOB" "${SLURMD_NODENAME:-$(uname -n)}" "$(date +%s)" "$ft_sizes" \
            >"$FT_RUN/lives/$FT_STAGE-$FT_LIFE"
    ) 2>/dev/null && break
    if [ ! -e "$FT_RUN/lives/$FT_STAGE-$FT_LIFE" ]; then
        echo "ftlib: $FT_RUN/lives cannot be written (moved, full, or not mounted on $(uname -n))"
        exit 1
    fi
done
export FT_LIFE

# Nothing that the stage needs is here: the outcome says so, and the epilogue acts by it.
if [ -n "$FT_REFUSED" ]; then
    echo "64 $FT_REFUSED; then make resume RUN=$(basename "$FT_RUN")" >"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"
    FT_WATCH=
    (exit 64)
    . slurm_templates/epilogue.sh
fi

# It must not hold the shell's output: who reads that to its end would wait for it.
bash slurm_templates/watch.sh $$ "$FT_LOG" "$FT_STEP" </dev/null >/dev/null 2>&1 &
FT_WATCH=$!
disown
