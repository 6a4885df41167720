//! How lines are typed: questions of several lines, and commands that complete themselves.

use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Context, Editor, Helper};

use super::session::COMMANDS;

/// A line editor for conversations.
pub(super) type ChatEditor = Editor<Typing, DefaultHistory>;

/// What the editor asks while a line is typed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Typing;

/// An editor that completes commands and goes on after a backslash.
pub(super) fn editor() -> rustyline::Result<ChatEditor> {
    let mut editor = ChatEditor::new()?;
    editor.set_helper(Some(Typing));
    Ok(editor)
}

/// What was meant by what was typed: a backslash at the end of a line only says that there is another.
pub(super) fn meant(typed: &str) -> String {
    typed.replace("\\\n", "\n")
}

impl Validator for Typing {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if context.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((0, completions(&line[..pos])))
    }
}

impl Hinter for Typing {
    type Hint = String;
}

impl Highlighter for Typing {}

impl Helper for Typing {}

/// Commands that begin with what was typed.
fn completions(typed: &str) -> Vec<String> {
    let commands = COMMANDS.iter().filter(|_| typed.starts_with('/'));
    commands.filter(|command| command.starts_with(typed)).map(|&command| command.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_complete_themselves() {
        #[rustfmt::skip]
        let rows: [(&str, &[&str]); 6] = [
            ("/", COMMANDS), ("/s", &["/system", "/stats"]), ("/sy", &["/system"]), ("/quit", &["/quit"]),
            ("", &[]), ("s", &[]),
        ];
        for (typed, expected) in rows {
            assert_eq!(completions(typed), expected, "{typed:?}");
        }
    }

    #[test]
    fn a_backslash_at_the_end_of_a_line_says_that_there_is_another() {
        #[rustfmt::skip]
        let rows = [
            ("one", "one"), ("one\\\ntwo", "one\ntwo"), ("pasted\nlines", "pasted\nlines"), ("a\\b", "a\\b"),
        ];
        for (typed, expected) in rows {
            assert_eq!(meant(typed), expected, "{typed:?}");
        }
    }
}
