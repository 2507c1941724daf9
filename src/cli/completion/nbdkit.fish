# Completion for nbdkit and nbdkit-mount in fish: the program itself knows what can follow.
function __nbdkit_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct | string unescape)
    $words[1] --complete -- $words "$current" 2>/dev/null
end
complete -c nbdkit -f -a '(__nbdkit_complete)'
complete -c nbdkit-mount -f -a '(__nbdkit_complete)'
