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
# The number of this stage's srun: it is the job's first unless another stage ran before it.
FT_STEP=$((${FT_STEP:--1} + 1))

# Lives share appended logs, one a rank: where this life's part begins.
ft_sizes="$(cd "$FT_RUN/slurm/$FT_STAGE" && stat -c %n:%s "${FT_JOB}"_*_log.out 2>/dev/null | tr '\n' ' ')"

# The first number that nobody has taken: one file a life, created by one writer.
FT_LIFE=1
until (
    set -C
    printf '%s %s %s %s\n' "$FT_JOB" "${SLURMD_NODENAME:-$(uname -n)}" "$(date +%s)" "$ft_sizes" \
        >"$FT_RUN/lives/$FT_STAGE-$FT_LIFE"
) 2>/dev/null; do
    if [ ! -e "$FT_RUN/lives/$FT_STAGE-$FT_LIFE" ]; then
        echo "ftlib: $FT_RUN/lives cannot be written (moved, full, or not mounted on $(uname -n))"
        exit 1
    fi
    FT_LIFE=$((FT_LIFE + 1))
done
export FT_LIFE

if [ "$FT_LIFE" -gt 1 ]; then
    "$FT_PYTHON" -m ftlib.slurm.settle earlier "$FT_RUN" "$FT_STAGE" "$FT_LIFE"
fi

# A killed slurmstepd leaves its srun waiting until the time limit, and its task without anyone to end it: no longer
# than one save. (scontrol listpids asks this node alone, not the controller.)
# Prints lives or gone; nothing where this node does not even tell of the shell's own step.
ft_step() {
    scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" |
        awk -v step="$FT_STEP" '$3 == "batch" && !it { it = "gone" } $3 == step { it = "lives" } END { print it }'
}
ft_gone() { [ "$(ft_step)" = gone ] && sleep 2 && [ "$(ft_step)" = gone ]; }
ft_tasks() {
    for ft_of in $(grep -lzxs "SLURM_STEP_ID=$FT_STEP" /proc/[0-9]*/environ); do
        grep -qzxs "SLURM_JOB_ID=$SLURM_JOB_ID" "$ft_of" && grep -qzxs "FT_LIFE=$FT_LIFE" "$ft_of" && basename "${ft_of%/*}"
    done
}
# A step that is killed at once is never seen alive here. Its task may be; the controller is asked once a minute.
ft_step_began() {
    [ "$(ft_step)" != lives ] || return 0
    [ -z "$(ft_tasks)" ] || return 0
    [ ! -s "$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE" ] || return 0
    [ $((SECONDS - ft_asked)) -ge 60 ] || return 1
    ft_asked=$SECONDS
    squeue -h -s -j "$FT_JOB" -o %i | grep -q "\.$FT_STEP\$" && sleep 30
}
ft_watch_step() {
    ft_asked=$SECONDS
    # Without its batch shell it has nothing to watch, and nobody would end it.
    until ft_step_began; do kill -0 $$ || return; sleep 1; done
    until ft_gone; do sleep 5; done
    if [ -s "$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE" ]; then
        sleep 60 # ended as it should; other nodes, or an absent controller, may keep srun for a while
    else
        echo "ftlib: the step's slurmstepd is gone; ending the step"
        kill -TERM $(ft_tasks)
        for _ in $(seq 30); do [ -z "$(ft_tasks)" ] || sleep 1; done
        kill -KILL $(ft_tasks)
    fi
    pkill -KILL -P $$ -x srun
} 2>/dev/null
ft_watch_step &
FT_WATCH=$!
disown
