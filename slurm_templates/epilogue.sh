# Last lines of every stage's batch script, on the host, right after srun. Sourced; decides how the job ends.
# The outcome file is the truth; srun's exit code is a hint, because the first rank to leave decides it.
ft_code=$?
[ -z "$FT_WATCH" ] || kill "$FT_WATCH" 2>/dev/null
if [ ! -d "$FT_RUN/lives" ]; then
    echo "ftlib: $FT_RUN is not there any more: it was moved or deleted while its job ran. The job ends"
    exit 64
fi
# A node that Slurm had given up is back: the run is a later life's now, and this job's id, too.
[ ! -e "$FT_RUN/lives/$FT_STAGE-$((FT_LIFE + 1))" ] || exit 75
ft_outcome="$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"
ft_words=
if [ -s "$ft_outcome" ]; then
    read -r ft_code ft_words <"$ft_outcome"
    # Another stage may follow in this job.
    [ "$ft_code" != 0 ] || return 0
elif [ "$ft_code" -eq 0 ]; then
    ft_code=1 # nothing says that it is done
fi

# Prints "requeued" or "exit CODE". Slurm's SIGTERM may come now, too (a requeue, a lost node): it must not end the one
# that looks for the cause, nor the scontrol calls after a requeue, which sends SIGTERM to every process of this shell.
read -r ft_do ft_number <<END
$(
    trap '' TERM
    exec "$FT_PYTHON" -m ftlib.slurm.attempt end "$FT_RUN" "$FT_STAGE" "$FT_LIFE" "$ft_code" "$FT_JOB" "$FT_LOG"
)
END
case "$ft_do" in
requeued)
    # Slurm ends this shell when it takes the job back.
    trap '' TERM
    for _ in $(seq 300); do sleep 1; done
    exit 75
    ;;
exit) exit "$ft_number" ;;
esac
echo "ftlib: the cause of this end could not be recorded (is the disk full?); the recovery job tries again"
exit "$ft_code"
