# Last lines of every stage's batch script, on the host, right after srun. Sourced; decides how the job ends.
# The outcome file is the truth; srun's exit code is a hint, because the first rank to leave decides it.
ft_code=$?
[ -z "$FT_WATCH" ] || kill "$FT_WATCH" 2>/dev/null
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

# requeue SECONDS NODE MIB WORDS | leave CODE WORDS | stop CODE WORDS
# SIGTERM may come now, too (a requeue, a lost node): it must not end the one that looks for the cause.
read -r ft_do ft_number ft_rest <<END
$(
    trap '' TERM
    exec "$FT_PYTHON" -m ftlib.slurm.settle end "$FT_RUN" "$FT_STAGE" "$FT_LIFE" "$ft_code" "$FT_JOB" "$FT_LOG"
)
END
if [ -z "$ft_do" ]; then
    echo "ftlib: the cause of this end could not be settled (is the disk full?)"
    case "$ft_code" in
    75 | 140 | 143) ft_do=requeue ft_number=30 ft_rest="- - it was interrupted" ;;
    *) ft_do=stop ft_number=$ft_code ft_rest="it is stopped" ;;
    esac
fi
if [ "$ft_do" != requeue ]; then
    echo "ftlib: $ft_rest"
    exit "$ft_number"
fi
read -r ft_node ft_mib ft_rest <<END
$ft_rest
END
echo "ftlib: $ft_rest"

# What the next attempt is to have: refused while the job runs, accepted right after the requeue. Waiting before the
# new start is Slurm's, too, so that no node is held meanwhile.
ft_changes=()
[ "$ft_number" = 0 ] || ft_changes+=("StartTime=now+$ft_number")
[ "$ft_node" = - ] || ft_changes+=("ExcNodeList=$ft_node")
[ "$ft_mib" = - ] || ft_changes+=("MinMemoryNode=$ft_mib")

# A requeue sends SIGTERM to every process of this shell; the scontrol that follows it must live.
trap '' TERM
ft_wait=1
while [ "$ft_wait" -le 256 ]; do
    ft_requeued=
    # Incomplete leaves a job alone that its owner has cancelled; a plain requeue would revive it.
    if scontrol requeue Incomplete "$FT_JOB"; then
        ft_requeued=1
    else
        # The controller forgets a job at the limit to be incomplete; it says TIMEOUT then, and only then we insist.
        case "$(scontrol show job "$FT_JOB" 2>/dev/null | grep -o 'JobState=[A-Z_]*')" in
        JobState=TIMEOUT) scontrol requeue "$FT_JOB" && ft_requeued=1 ;;
        JobState=CANCELLED) exit 143 ;;
        esac
    fi
    if [ -n "$ft_requeued" ]; then
        [ "${#ft_changes[@]}" -eq 0 ] || scontrol update "JobId=$FT_JOB" "${ft_changes[@]}" ||
            echo "ftlib: the requeued job was not changed: ${ft_changes[*]}"
        # Slurm ends this shell when it takes the job back.
        for _ in $(seq 300); do sleep 1; done
        exit 75
    fi
    echo "ftlib: the requeue was not accepted; trying again in $ft_wait s"
    sleep "$ft_wait"
    ft_wait=$((ft_wait * 2))
done
exit 75 # the guard goes on from here
