# First lines of every stage's batch script, on the host, in the run's code folder. Sourced.
# Says which life this is and keeps the batch shell alive for the epilogue.

# At the time limit the batch shell gets SIGTERM, too; without this it dies before the epilogue.
trap : TERM

# A save that a kill cut short would make submitit's next one fail.
rm -f "$FT_RUN/slurm/$FT_STAGE/"*.save_tmp

# The first number that nobody has taken: one file a life, created by one writer.
FT_LIFE=1
until (set -C; printf '%s %s %s\n' "${SLURM_JOB_ID:-0}" "$(uname -n)" "$(date +%s)" >"$FT_RUN/lives/$FT_STAGE-$FT_LIFE") 2>/dev/null; do
    if [ ! -e "$FT_RUN/lives/$FT_STAGE-$FT_LIFE" ]; then
        echo "ftlib: $FT_RUN/lives cannot be written (moved, full, or not mounted on $(uname -n))"
        exit 1
    fi
    FT_LIFE=$((FT_LIFE + 1))
done
export FT_LIFE
