r"""``kamal-proxy completion``: the scripts that shells load, one for each.

They know nothing of the commands: they ask the program (see ``completion``), which is given the
words as the shell would give them, without their quotes. No script ever evaluates a text, be it of
the command line or of the answer: names come from whoever deployed. What is put on the command line
is quoted, by the shell itself in fish and zsh.
"""

import sys
from typing import Annotated

from cyclopts import Parameter

from kamal_proxy.cli.arguments import Bool

_BASH = r"""# Completion of kamal-proxy in bash, with or without the package bash-completion.

# Split a text into words as the shell would, without their quotes, into the array "words"; the last
# is the word that the text ends in, which may be empty. "quote" is the quote that is still open.
_kamal_proxy_split() {
	local text=$1 word='' begun='' char i
	words=() quote=''
	for ((i = 0; i < ${#text}; i++)); do
		char=${text:i:1}
		if [[ $quote != \' && $char == \\ ]]; then
			((i++))
			# Between double quotes it is a backslash, but before these.
			[[ $quote && ${text:i:1} != [\$\`\"\\] ]] && word+=\\
			word+=${text:i:1} begun=1
		elif [[ $quote ]]; then
			if [[ $char == "$quote" ]]; then quote=''; else word+=$char; fi
		elif [[ $char == [\"\'] ]]; then
			quote=$char begun=1
		elif [[ $char == [[:space:]] ]]; then
			[[ $begun ]] && words+=("$word")
			word='' begun=''
		else
			word+=$char begun=1
		fi
	done
	words+=("$word")
}

_kamal_proxy() {
	local IFS=$' \t\n' quote value flag='' skip candidate quoted directive
	local -a words piece answer

	# How much of the word is before the part that bash replaces: it breaks words at = and : too.
	_kamal_proxy_split "$2"
	piece=("${words[@]}")
	_kamal_proxy_split "${COMP_LINE:0:COMP_POINT}"
	if ((${#words[@]} > 2)) && [[ ${words[-2]} == *[\<\>] ]]; then
		compopt -o default # a redirection
		return
	fi
	value=${words[-1]}
	if [[ $value == -*=* ]]; then
		flag=${value%%=*}=
		value=${value#*=}
	fi
	skip=$((${#value} - ${#piece[-1]}))

	local program=${words[0]/#~\//$HOME/}
	type -P -- "$program" >/dev/null || program=kamal-proxy
	mapfile -t answer < <("$program" __completeQuotingNoDesc "${words[@]:1}" 2>/dev/null)
	((${#answer[@]})) || return 0
	directive=${answer[-1]}
	unset 'answer[-1]'

	COMPREPLY=()
	for candidate in "${answer[@]}"; do
		if ((skip >= 0)); then candidate=${candidate:skip}; else candidate=$flag$candidate; fi
		printf -v quoted %q "$candidate"
		# Where a quote is open, only what needs none can be put.
		if [[ ! $quote ]]; then
			COMPREPLY+=("$quoted")
		elif [[ $quoted == "$candidate" ]]; then
			COMPREPLY+=("$candidate")
		fi
	done
	case $directive in
	:0) compopt -o default ;;
	:16) compopt -o filenames -o dirnames ;;
	esac
}

complete -F _kamal_proxy kamal-proxy
"""

_ZSH = r"""#compdef kamal-proxy
# Completion of kamal-proxy in zsh.

_kamal-proxy() {
	local program=${(Q)words[1]} line text directive
	local -a before answer candidates

	program=${program/#\~\//$HOME/}
	whence -p -- $program >/dev/null || program=kamal-proxy
	before=("${(@Q)words[2,CURRENT-1]}")
	answer=("${(@f)$("$program" @COMPLETE@ "$before[@]" "${(Q)PREFIX}" 2>/dev/null)}")
	directive=$answer[-1]
	answer[-1]=()

	[[ $PREFIX == -*=* ]] && compset -P 1 '*='
	for line in $answer; do
		text=${line%%$'\t'*}
		text=${${text//\\/\\\\}//:/\\:}
		[[ $line == *$'\t'* ]] && text+=:${line#*$'\t'}
		candidates+=("$text")
	done
	case $directive in
	:0) _files ;;
	:16) _path_files -/ ;;
	*) _describe kamal-proxy candidates ;;
	esac
}

if [[ $funcstack[1] == _kamal-proxy ]]; then
	_kamal-proxy "$@"
else
	compdef _kamal-proxy kamal-proxy
fi
"""

_FISH = r"""# Completion of kamal-proxy in fish.

function __kamal_proxy_complete
	set -l words (commandline -opc)
	set -l raw (commandline -ct)
	set -l current (string unescape -- $raw)
	or set current $raw
	set -l program $words[1]
	set -e words[1]
	type -fq -- $program
	or set program kamal-proxy

	set -l answer (command $program @COMPLETE@ $words "$current" 2>/dev/null)
	set -l directive $answer[-1]
	set -e answer[-1]

	set -l flag (string match -r -- '^-[^=]*=' "$current")
	# Still as it was typed: here fish itself takes the quotes away.
	set -l value (string replace -r -- '^-[^=]*=' '' "$raw")
	switch "$directive"
		case :0
			set answer (complete -C "'' $value")
		case :16
			set answer (__fish_complete_directories "$value" '')
	end
	for line in $answer
		printf '%s\n' "$flag$line"
	end
end

complete -c kamal-proxy -e
complete -c kamal-proxy -f -a '(__kamal_proxy_complete)'
"""

Descriptions = Annotated[Bool, Parameter(help="Offer the words alone, without what they mean")]


def bash(*, no_descriptions: Descriptions = False) -> None:
    """Print the script for bash.

    It needs bash 4.3 or newer; the package bash-completion, where it is installed, loads the script
    by itself from the right directory. bash shows no descriptions.
    """
    del no_descriptions  # as it is anyway
    sys.stdout.write(_BASH)


def zsh(*, no_descriptions: Descriptions = False) -> None:
    """Print the script for zsh.

    Put it into a directory of $fpath, under the name _kamal-proxy; completion must be on, which it
    is after 'autoload -U compinit; compinit' in ~/.zshrc. It can also be read there, after that.
    """
    sys.stdout.write(_asking(_ZSH, descriptions=not no_descriptions))


def fish(*, no_descriptions: Descriptions = False) -> None:
    """Print the script for fish.

    Put it into ~/.config/fish/completions, under the name kamal-proxy.fish; new shells then have
    it.
    """
    sys.stdout.write(_asking(_FISH, descriptions=not no_descriptions))


def _asking(script: str, *, descriptions: bool) -> str:
    return script.replace(
        "@COMPLETE@", "__completeQuoting" if descriptions else "__completeQuotingNoDesc"
    )
