# What srun starts for each task where stages run in an image; sourced by nobody, run by bash in the run's code folder:
#   bash container.sh APPTAINER IMAGE LOCK [--nv] [FOLDER...] -- COMMAND...
# FOLDERs keep their paths inside. Whatever does not fit is said in the outcome, in the first seconds: 64, nothing lost.
apptainer=$1 image=$2 lock=$3
shift 3

refuse() {
    words="$1 (on $(uname -n)). $2; then make resume RUN=$(basename "$FT_RUN")"
    echo "ftlib: $words"
    # The first rank that finds something speaks; srun ends the others.
    (set -C && echo "64 $words" >"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE") 2>/dev/null
    exit 64
}

# --no-eval: else a $ or backquote in a value or a path would be run.
options=(exec --cleanenv --no-eval --pwd "$PWD")
folders=("$FT_RUN")
for own in "$XDG_CACHE_HOME" "$HF_HOME" "$TMPDIR"; do
    [ -z "$own" ] || { mkdir -p "$own" && folders+=("$own"); }
done
[ ! -f "$HF_TOKEN_PATH" ] || folders+=("$HF_TOKEN_PATH") # the token of hf auth login
while [ "$1" != -- ]; do
    case $1 in --*) options+=("$1") ;; *) folders+=("$1") ;; esac
    shift
done
shift

command -v "$apptainer" >/dev/null ||
    refuse "there is no $apptainer here" "Name its module or path in the profile (container.module, container.command), or run without the image: SET=\"cluster.container=null\""
[ -e "$image" ] ||
    refuse "the image $image does not exist here" "Build it (make image) where every node sees it, or ask whether the storage is mounted"
for folder in "${folders[@]}"; do
    [ -e "$folder" ] || refuse "$folder, which the image must show, does not exist here" "Mend container.binds, or ask whether it is mounted"
    quoted=${folder//\"/\"\"} # as in a CSV file: commas, colons and quotes pass
    options+=(--mount "type=bind,\"source=$quoted\",\"destination=$quoted\"")
done
if [ "${SLURM_LOCALID:-0}" = 0 ]; then
    labels=$("$apptainer" --nocolor inspect --labels "$image" 2>&1) ||
        refuse "$apptainer cannot read the image $image: $(tail -n 1 <<<"$labels")" "Remove it and build it anew: make image"
    found=$(sed -n 's/^org\.ftlib\.lock: //p' <<<"$labels")
    [ "$found" = "$lock" ] ||
        refuse "the image $image holds the packages of lock ${found:-unknown}, this run wants $lock" "Build it anew (make image), or take away container.image"
fi

# With --cleanenv nothing passes but these, and not on the command line, where everyone could read a token.
# FT_PASS: names of what the run and its profile set.
for name in $(compgen -e); do
    case $name in
    TRITON_CACHE_DIR) ;; # the image puts it on the node's own disk
    SLURM_* | SLURMD_NODENAME | SUBMITIT_* | FT_* | CUDA_VISIBLE_DEVICES | ROCR_VISIBLE_DEVICES | NCCL_* | GLOO_* | \
        UCX_* | MASTER_* | HF_* | WANDB_* | TMPDIR | TZ | *_proxy | *_PROXY) export "APPTAINERENV_$name=${!name}" ;;
    *) case " $FT_PASS " in *" $name "*) export "APPTAINERENV_$name=${!name}" ;; esac ;;
    esac
done
# Without root the image is mounted by a process beside the worker. Where Slurm warns every process of a step (or a terminal
# its whole foreground), that one must not hear it: the worker is saving, and the image must not go from under it.
deaf=/tmp/ftlib-deaf-$UID # no colon can stand in PATH
mkdir -m 700 "$deaf" 2>/dev/null
if [ -O "$deaf" ] && [ ! -L "$deaf" ]; then
    # Apptainer starts them without a PATH; its own are beside it.
    where="$(dirname "$(command -v "$apptainer")")/../libexec/apptainer/bin:/usr/libexec/apptainer/bin:${PATH//$deaf:/}:/usr/bin"
    for name in squashfuse_ll squashfuse fuse-overlayfs; do
        printf '#!/bin/bash\ntrap "" INT TERM HUP USR1 USR2\nPATH=%q exec %s "$@"\n' "$where" "$name" >"$deaf/.$name.$$"
        chmod +x "$deaf/.$name.$$" && mv "$deaf/.$name.$$" "$deaf/$name"
    done
    export PATH="$deaf:$PATH"
fi
export "APPTAINERENV_FT_IMAGE=$(basename "$image") sha256:$(cut -c 1-64 "$image.sha256" 2>/dev/null)"
exec "$apptainer" --nocolor --quiet "${options[@]}" "$image" "$@"
