//! Held against what transformers renders for the same templates and conversations.

use std::path::{Path, PathBuf};

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Deserialize;
use serde_json::json;

use super::*;

/// One conversation, and what transformers made of it.
#[derive(Deserialize)]
struct Golden {
    name: String,
    messages: Vec<Json>,
    tools: Option<Vec<Json>>,
    #[serde(default)]
    documents: Option<Vec<Json>>,
    kwargs: Map<String, Json>,
    add_generation_prompt: bool,
    bos_token: Option<String>,
    eos_token: Option<String>,
    now: String,
    #[serde(default)]
    expect: Option<String>,
    /// What the template said with `raise_exception`.
    #[serde(default)]
    error: Option<String>,
    /// Whether Python stumbled over the template.
    #[serde(default)]
    fails: bool,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/chat_templates")
}

fn clock_at(now: &str) -> Clock {
    let now = now.parse::<DateTime>().unwrap().to_zoned(TimeZone::UTC).unwrap();
    Arc::new(move || now.clone())
}

fn template(source: &Json) -> ChatTemplate {
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true});
    ChatTemplate::new(source, tokens.as_object().unwrap(), clock_at("2025-03-09T07:05:04")).unwrap()
}

fn conversation(messages: &Json) -> Conversation {
    Conversation { messages: messages.as_array().unwrap().clone(), ..Conversation::default() }
}

fn check(template: &str, golden: &Golden) -> Result<(), String> {
    let tokens = json!({"bos_token": golden.bos_token, "eos_token": golden.eos_token});
    let compiled = ChatTemplate::new(&json!(template), tokens.as_object().unwrap(), clock_at(&golden.now))
        .map_err(|error| format!("{error:#}: {:?}", std::error::Error::source(&error)))?;
    let rendered = compiled.render(&Conversation {
        messages: golden.messages.clone(),
        tools: golden.tools.clone(),
        documents: golden.documents.clone(),
        add_generation_prompt: golden.add_generation_prompt,
        variables: golden.kwargs.clone(),
    });
    match (&golden.expect, &golden.error, rendered) {
        (Some(expected), None, Ok(text)) if text == *expected => Ok(()),
        (None, Some(message), Err(TemplateError::Refused(said))) if said == *message => Ok(()),
        (None, None, Err(TemplateError::Render(_))) if golden.fails => Ok(()),
        (expected, error, rendered) => {
            Err(format!("\nexpected {expected:?} {error:?} fails={}\n     got {rendered:?}", golden.fails))
        }
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let mut templates = 0;
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        templates += 1;
        let template = std::fs::read_to_string(&path).unwrap();
        let goldens = std::fs::read_to_string(path.with_extension("goldens.json")).unwrap();
        let goldens: Vec<Golden> = serde_json::from_str(&goldens).unwrap();
        assert!(!goldens.is_empty(), "{}", path.display());
        for golden in &goldens {
            if let Err(failure) = check(&template, golden) {
                failures.push(format!("{}, {}: {failure}", path.display(), golden.name));
            }
        }
    }
    assert!(7 <= templates, "the fixtures are there");
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_named_template_is_chosen_by_whether_there_are_tools() {
    let source = json!([
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]);
    let template = template(&source);
    let mut asked = conversation(&json!([]));
    assert_eq!(template.render(&asked).unwrap(), "plain");
    asked.tools = Some(vec![json!({})]);
    assert_eq!(template.render(&asked).unwrap(), "tools 1");
}

#[test]
fn special_tokens_may_be_objects_and_variables_override_them() {
    let template = template(&json!("{{ bos_token }}{{ eos_token }}{{ add_bos_token is defined }}"));
    let mut asked = conversation(&json!([]));
    assert_eq!(template.render(&asked).unwrap(), "<s></s>False");
    asked.variables.insert("eos_token".to_owned(), json!("!"));
    assert_eq!(template.render(&asked).unwrap(), "<s>!False");
}

#[test]
fn what_a_template_refuses_is_said_in_its_words() {
    let template = template(&json!(
        "{% if messages | length == 0 %}{{ raise_exception('no messages: ' ~ 1) }}{% endif %}"
    ));
    let refusal = template.render(&conversation(&json!([]))).unwrap_err();
    assert!(
        matches!(&refusal, TemplateError::Refused(message) if message == "no messages: 1"),
        "{refusal:?}"
    );
}

#[test]
fn what_does_not_fit_is_an_error_and_no_panic() {
    let rows = [
        ("attribute of nothing", "{{ messages[5].content.text }}"),
        ("unknown function", "{{ frobnicate() }}"),
        ("unknown filter", "{{ 1 | frobnicate }}"),
        ("nothing as JSON", "{{ nothing | tojson }}"),
        ("a date format that is none", "{{ strftime_now('%!') }}"),
        ("endless recursion", "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"),
    ];
    for (rule, source) in rows {
        let outcome = template(&json!(source)).render(&conversation(&json!([])));
        assert!(matches!(outcome, Err(TemplateError::Render(_))), "{rule}: {outcome:?}");
    }
}

#[test]
fn what_is_no_template_is_refused_at_once() {
    let rows = [("syntax", json!("{% if %}")), ("a number", json!(7)), ("a list of texts", json!(["a"]))];
    for (rule, source) in rows {
        let outcome = ChatTemplate::new(&source, &Map::new(), system_clock());
        assert!(
            matches!(outcome, Err(TemplateError::Compile(_) | TemplateError::Shape)),
            "{rule}: {outcome:?}"
        );
    }
}
