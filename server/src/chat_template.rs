//! Messages to text, as Hugging Face transformers renders them.
//!
//! Templates are programs that were only ever run by Python's Jinja in the set-up of transformers: `trim_blocks`,
//! `lstrip_blocks`, loop controls, Python's string methods, `raise_exception`, `strftime_now`, and a `tojson` that is
//! `json.dumps`. Anything that differs changes the model's input without anybody noticing, so the set-up is copied
//! in each detail and held against transformers' own output in the tests.

mod python_json;

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value as Json};

/// A model's chat template, compiled.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and others, by name, as templates see them.
    special_tokens: BTreeMap<String, Value>,
}

/// What a template is asked to render.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    /// The messages, oldest first; each an object with `role` and `content`.
    pub(crate) messages: Vec<Json>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<Json>>,
    /// Texts to answer from.
    pub(crate) documents: Option<Vec<Json>>,
    /// Whether the text ends where the model's answer begins.
    pub(crate) add_generation_prompt: bool,
    /// Further variables of the template.
    pub(crate) variables: Map<String, Json>,
}

/// What time a template believes it is.
pub(crate) type Clock = Arc<dyn Fn() -> jiff::Zoned + Send + Sync>;

/// A template could not be made or rendered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The template is not one.
    #[error("the chat template cannot be compiled: {0}")]
    Compile(#[source] Error),
    /// `chat_template` is neither text nor a list of named texts.
    #[error("chat_template in tokenizer_config.json is neither a string nor a list of name and template")]
    Shape,
    /// The template refused the conversation, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The template does not fit the conversation.
    #[error("the chat template failed: {0}")]
    Render(#[source] Error),
}

impl ChatTemplate {
    /// Compiles `source`: a string, or a list of named templates. `tokenizer_config` tells the special tokens.
    pub(crate) fn new(
        source: &Json,
        tokenizer_config: &Map<String, Json>,
        clock: Clock,
    ) -> Result<Self, TemplateError> {
        let mut environment = environment(clock);
        for (name, template) in named_templates(source)? {
            let template = without_generation_tags(template);
            environment.add_template_owned(name, template).map_err(TemplateError::Compile)?;
        }
        Ok(Self { environment, special_tokens: special_tokens(tokenizer_config) })
    }

    /// The text of a conversation.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let name = if conversation.tools.is_some() && self.environment.get_template(TOOL_USE).is_ok() {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self.environment.get_template(name).map_err(TemplateError::Render)?;
        let mut variables = self.special_tokens.clone();
        for (name, value) in &conversation.variables {
            variables.insert(name.clone(), Value::from(Serde(value)));
        }
        let list = |items: &Option<Vec<Json>>| {
            items.as_ref().map_or(Value::from(()), |items| Value::from(Serde(items)))
        };
        let messages: Vec<Json> = conversation.messages.iter().map(as_transformers_passes).collect();
        variables.insert("messages".to_owned(), Value::from(Serde(messages)));
        variables.insert("tools".to_owned(), list(&conversation.tools));
        variables.insert("documents".to_owned(), list(&conversation.documents));
        variables.insert("add_generation_prompt".to_owned(), Value::from(conversation.add_generation_prompt));
        template.render(Value::from(variables)).map_err(render_error)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let templates: Vec<&str> = self.environment.templates().map(|(name, _)| name).collect();
        f.debug_struct("ChatTemplate").field("templates", &templates).finish_non_exhaustive()
    }
}

/// A clock that shows the local time of this machine.
pub(crate) fn system_clock() -> Clock {
    Arc::new(jiff::Zoned::now)
}

fn environment(clock: Clock) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        jiff::fmt::strtime::format(format, &clock()).map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, "strftime_now cannot write this format")
                .with_source(error)
        })
    });
    environment
}

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
#[expect(clippy::needless_pass_by_value, reason = "filters are given their arguments by value")]
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get::<Option<usize>>("indent")?);
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let separators = match separators.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "separators must be a pair of strings"));
        }
    };
    let style = python_json::Style::new(indent, separators, sort_keys);
    Ok(Value::from(python_json::dumps(value, &style)?))
}

/// The templates in `chat_template`, by name.
fn named_templates(source: &Json) -> Result<Vec<(String, &str)>, TemplateError> {
    match source {
        Json::String(template) => Ok(vec![(DEFAULT.to_owned(), template)]),
        Json::Array(list) => {
            list.iter().map(named_template).collect::<Option<Vec<_>>>().ok_or(TemplateError::Shape)
        }
        _ => Err(TemplateError::Shape),
    }
}

fn named_template(entry: &Json) -> Option<(String, &str)> {
    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?))
}

/// Names such as `bos_token`, each a string or an object with `content`.
fn special_tokens(tokenizer_config: &Map<String, Json>) -> BTreeMap<String, Value> {
    let text = |value: &Json| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    let mut tokens: BTreeMap<String, Value> = tokenizer_config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| Some((name.clone(), Value::from(text(value)?))))
        .collect();
    if let Some(Json::Array(list)) = tokenizer_config.get("additional_special_tokens") {
        let list: Vec<String> = list.iter().filter_map(text).collect();
        tokens.insert("additional_special_tokens".to_owned(), Value::from(list));
    }
    tokens
}

/// What transformers does to a message before Jinja sees it: keys without a value go, since many templates would write
/// them as `None`, and a thought is found under each of its names.
fn as_transformers_passes(message: &Json) -> Json {
    let Json::Object(fields) = message else { return message.clone() };
    let mut fields: Map<String, Json> =
        fields.clone().into_iter().filter(|(_, value)| !value.is_null()).collect();
    let thought =
        ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(|name| fields.get(name).cloned());
    if let Some(thought) = thought {
        fields.entry("thinking").or_insert_with(|| thought.clone());
        fields.insert("reasoning_content".to_owned(), thought);
    }
    Json::Object(fields)
}

/// Replaces `{% generation %}`, by which transformers marks the assistant's part for training, with a block that
/// has the same scope and no effect.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let word = tag[2..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace("generation", "with")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endwith")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn render_error(error: Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref::<Raised>() {
            return TemplateError::Refused(message.clone());
        }
        cause = current.source();
    }
    TemplateError::Render(error)
}

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

#[cfg(test)]
mod tests;
