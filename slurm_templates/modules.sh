# Loads the modules that a profile names: `. modules.sh MODULE...`, on the host, before the prologue. Sourced.
# A module that cannot be loaded is named in FT_REFUSED; the prologue ends the stage with it.

# A shell other than bash hands its `module` down to nobody.
command -v module >/dev/null || . /etc/profile >/dev/null 2>&1

FT_REFUSED=
for ft_module in "$@"; do
    # What the login shell had loaded stays marked as loaded, and would not be loaded again.
    module unload "$ft_module" >/dev/null 2>&1
    # In a shell of its own, because what it says is wanted: older versions of module return 0 whatever happens.
    ft_said=$(module load "$ft_module" 2>&1)
    ft_code=$?
    case $ft_said in *ERROR* | *"Lmod has detected"*) ft_code=1 ;; esac
    if [ "$ft_code" -ne 0 ]; then
        ft_said=$(grep -m 1 '[^[:space:]]' <<<"$ft_said")
        FT_REFUSED="module load $ft_module failed on ${SLURMD_NODENAME:-$(uname -n)}: $ft_said. 'module spider"
        FT_REFUSED="$FT_REFUSED ${ft_module%%/*}' lists what there is; the names are 'modules' (and container.module) in cluster.yaml"
        echo "ftlib: $FT_REFUSED"
        break
    fi
    module load "$ft_module" >/dev/null 2>&1
done
unset ft_module ft_said ft_code
