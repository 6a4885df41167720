//! `/tokenize` and `/detokenize`, with the fields of vLLM's.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use super::App;
use super::body::Fields;
use super::conversation::conversation;
use super::error::ApiError;
use super::request::{DetokenizeFields, TokenizeFields};

/// The tokens of a text or a conversation.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    let body = Fields::read(request, app.config.body).await?;
    let fields: TokenizeFields = body.get()?;
    app.check_model(fields.model.as_deref())?;
    let _permit = app.admit(1)?;
    let tokens = match fields.prompt {
        Some(prompt) => app.encode(prompt, fields.add_special_tokens.unwrap_or(true)).await?,
        None if body.as_map().contains_key("messages") => {
            app.render_and_encode(conversation(&body)?, fields.add_special_tokens.unwrap_or(false)).await?
        }
        None => {
            return Err(ApiError::Invalid {
                message: "Missing required parameter: 'prompt' or 'messages'.".to_owned(),
                param: Some("prompt".to_owned()),
                code: Some("missing_required_parameter"),
            });
        }
    };
    let names = fields.return_token_strs.unwrap_or(false).then(|| {
        let name = |&id| app.text.tokenizer.name_of(id).unwrap_or_default();
        tokens.iter().map(name).collect::<Vec<String>>()
    });
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.max_model_len().ok(),
        "tokens": tokens,
        "token_strs": names,
    })))
}

/// The text of tokens, special ones included.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = Fields::read(request, app.config.body).await?;
    let fields: DetokenizeFields = body.get()?;
    app.check_model(fields.model.as_deref())?;
    app.check_tokens("tokens", &fields.tokens)?;
    Ok(Json(json!({"prompt": app.decode(&fields.tokens, false)?})))
}
