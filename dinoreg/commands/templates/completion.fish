# Completion of dinoreg for fish: dinoreg completion fish > ~/.config/fish/completions/dinoreg.fish
function __dinoreg_words
    set -l typed (commandline -opc)
    set -l current (commandline -ct)
    dinoreg completion words $typed[2..-1] "$current" 2>/dev/null
end
complete -c dinoreg -f -a '(__dinoreg_words)'
