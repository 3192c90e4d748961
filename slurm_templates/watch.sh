# Ends a step whose slurmstepd was killed: its srun would wait until the time limit, and nobody would end its task.
#   bash watch.sh BATCH_SHELL LOG STEP
# Started by the prologue, on the host. A node's own slurmd is asked (scontrol listpids), never the controller but
# once a minute while the step has not been seen; processes are looked at only once the step is missed, and only ours.
ft_shell=$1 ft_log=$2 ft_number=$3

# Seconds between two questions while the step has not been seen yet, and from then on.
FIRST_S=1 MOST_S=${FT_WATCH_S:-10}

trap 'kill "$ft_sleeping" 2>/dev/null; exit' TERM
ft_pause() {
    sleep "$1" &
    ft_sleeping=$!
    wait "$ft_sleeping"
}

# Prints lives or gone; nothing where this node does not even tell of the shell's own step.
ft_step() {
    scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" |
        awk -v step="$ft_number" '$3 == "batch" && !found { found = "gone" } $3 == step { found = "lives" } END { print found }'
}
ft_gone() { [ "$(ft_step)" = gone ] && ft_pause 2 && [ "$(ft_step)" = gone ]; }

# The step's own processes, by their environment. Reads every process of this user on the node, so only where needed.
ft_tasks() {
    for ft_process in $(find /proc -maxdepth 1 -name '[0-9]*' -uid "$UID"); do
        grep -qzxs "SLURM_STEP_ID=$ft_number" "$ft_process/environ" &&
            grep -qzxs "SLURM_JOB_ID=$SLURM_JOB_ID" "$ft_process/environ" &&
            grep -qzxs "FT_LIFE=$FT_LIFE" "$ft_process/environ" && basename "$ft_process"
    done
}

ft_ended() { [ -s "$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE" ]; }

# A step that is killed at once is never seen alive. Its task may be: it is looked for more and more seldom, and the
# controller, which may know a step of which nothing is left here, is asked once a minute.
ft_step_began() {
    [ "$(ft_step)" != lives ] || return 0
    ! ft_ended || return 0
    [ "$SECONDS" -ge "$ft_look_at" ] || return 1
    [ -z "$(ft_tasks)" ] || return 0
    ft_look_at=$((SECONDS * 2 < SECONDS + 60 ? SECONDS * 2 : SECONDS + 60))
    [ "$SECONDS" -ge "$ft_ask_at" ] || return 1
    ft_ask_at=$((SECONDS + 60))
    squeue -h -s -j "$FT_JOB" -o %i | grep -q "\.$ft_number\$" && ft_pause 30
}

# Without its batch shell it has nothing to watch, and nobody would end it.
ft_shell_lives() { kill -0 "$ft_shell"; }

ft_look_at=5 ft_ask_at=60 ft_every=$FIRST_S
until ft_step_began; do
    ft_shell_lives || exit
    ft_pause "$ft_every"
    [ "$ft_every" -ge "$MOST_S" ] || [ "$SECONDS" -lt 10 ] || ft_every=$((ft_every * 2))
done
until ft_gone; do
    ft_shell_lives || exit
    ft_pause "$MOST_S"
done
if ft_ended; then
    ft_pause 60 # it ended as it should; other nodes, or an absent controller, may keep srun for a while
else
    echo "ftlib: the step's slurmstepd is gone; ending the step" >>"$ft_log"
    kill -TERM $(ft_tasks)
    for _ in $(seq 30); do [ -z "$(ft_tasks)" ] || ft_pause 1; done
    kill -KILL $(ft_tasks)
fi
pkill -KILL -P "$ft_shell" -x srun
