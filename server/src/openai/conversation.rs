//! From a request's messages to what a template renders.
//!
//! Templates were written for transformers, where content is a string, arguments of calls are objects and the system
//! role is called `system`. The API says some of that differently; the rest of each message reaches the template as
//! it came, since only the template knows what it reads.

use serde_json::{Map, Value};

use super::body::Fields;
use super::error::ApiError;
use super::request::{ContentPart, ConversationFields, Message, OneOrMany};
use super::sampling::at_most;
use crate::chat_template::Conversation;

/// Reads the conversation in a body.
pub(crate) fn conversation(body: &Fields) -> Result<Conversation, ApiError> {
    let fields: ConversationFields = body.get()?;
    if fields.messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "Invalid 'messages': the list is empty, there must be one at least.",
        ));
    }
    at_most("messages", fields.messages.len(), MAX_MESSAGES)?;
    let raw = body
        .as_map()
        .get("messages")
        .and_then(Value::as_array)
        .expect("a list, since the fields could be read");
    let messages = fields
        .messages
        .iter()
        .zip(raw)
        .enumerate()
        .map(|(index, (message, raw))| for_template(&format!("messages[{index}]"), message, raw))
        .collect::<Result<Vec<_>, _>>()?;
    let objects = |list: Option<Vec<Map<String, Value>>>| {
        let list = list.filter(|list| !list.is_empty())?;
        Some(list.into_iter().map(Value::Object).collect())
    };
    Ok(Conversation {
        messages,
        tools: objects(fields.tools),
        documents: objects(fields.documents),
        add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
        variables: fields.chat_template_kwargs.unwrap_or_default(),
    })
}

/// Refuses a choice of tools that needs the answer to be parsed or constrained.
pub(crate) fn check_tool_choice(choice: Option<&Value>) -> Result<(), ApiError> {
    match choice {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(choice)) if choice == "none" || choice == "auto" => Ok(()),
        Some(choice) => {
            let message = format!("tool_choice {choice} is not supported, only 'none' and 'auto'.");
            Err(ApiError::unsupported("tool_choice", message))
        }
    }
}

fn for_template(path: &str, message: &Message, raw: &Value) -> Result<Value, ApiError> {
    let mut out = raw.as_object().expect("an object, since its fields could be read").clone();
    // OpenAI's newer name, which templates do not know and many would drop without a word.
    if message.role == "developer" {
        out.insert("role".to_owned(), Value::from("system"));
    }
    match &message.content {
        Some(OneOrMany::One(_)) => {}
        Some(OneOrMany::Many(parts)) => {
            out.insert("content".to_owned(), Value::from(joined(path, parts)?));
        }
        None if message.role == "assistant" && message.tool_calls.is_some() => {}
        None => {
            return Err(ApiError::Invalid {
                message: format!("Missing required parameter: '{path}.content'."),
                param: Some(format!("{path}.content")),
                code: Some("missing_required_parameter"),
            });
        }
    }
    for (index, call) in message.tool_calls.iter().flatten().enumerate() {
        let arguments = match &call.function.arguments {
            None => Value::Object(Map::new()),
            Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
            Some(Value::String(text)) => serde_json::from_str(text).map_err(|error| {
                let param = format!("{path}.tool_calls[{index}].function.arguments");
                ApiError::invalid(&param, format!("Invalid value for '{param}': not valid JSON: {error}."))
            })?,
            Some(object) => object.clone(),
        };
        out["tool_calls"][index]["function"]["arguments"] = arguments;
    }
    Ok(Value::Object(out))
}

/// Text parts as one text, a line each.
fn joined(path: &str, parts: &[ContentPart]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        if part.r#type != "text" {
            let message = format!("Content of type '{}' is not supported, only 'text'.", part.r#type);
            return Err(ApiError::unsupported(&format!("{path}.type"), message));
        }
        let Some(text) = &part.text else {
            let param = format!("{path}.text");
            return Err(ApiError::invalid(&param, format!("Missing required parameter: '{param}'.")));
        };
        texts.push(text.as_str());
    }
    Ok(texts.join("\n"))
}

const MAX_MESSAGES: usize = 4096;
