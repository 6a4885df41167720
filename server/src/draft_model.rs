//! The model that guesses for another: its files, and that it has the same tokens.

use anyhow::Context;
use indicatif::MultiProgress;
use tidemill_engine::handle::ModelSource;
use tidemill_engine::models::{GgufModel, ModelFiles};

use crate::flags::{EngineFlags, ModelFlags};
use crate::model_source::{self, ResolvedModel};
use crate::tokenizer::{Tokenizer, tokenizer_json};

/// Finds the files of the draft model that the flags name, if they name one, and fetches them if they are not here.
/// Refuses a model whose tokens are not those of `model`: its guesses would be right by accident only.
pub(crate) fn resolve(
    engine: &EngineFlags,
    flags: &ModelFlags,
    model: &ResolvedModel,
    bars: &MultiProgress,
) -> anyhow::Result<Option<ModelSource>> {
    let draft = engine.speculative_config.as_ref().and_then(|config| config.draft_model.as_ref());
    let Some(draft) = draft else { return Ok(None) };
    let source = model_source::resolve(&flags.of_draft(draft), bars).context("the draft model")?.source;
    if let (Some(ours), Some(theirs)) = (tokenizer(&model.source)?, tokenizer(&source)?)
        && let Some(id) = ours.first_difference(&theirs)
    {
        let name = |tokenizer: &Tokenizer| {
            tokenizer.name_of(id).map_or_else(|| "missing".to_owned(), |name| format!("`{name}`"))
        };
        anyhow::bail!(
            "the draft model {} has another tokenizer than {}: token {id} is {} there and {} here",
            draft.model,
            model.name,
            name(&theirs),
            name(&ours)
        );
    }
    Ok(Some(source))
}

/// `None` where there is none, as in a worker's folder of nothing but weights.
fn tokenizer(source: &ModelSource) -> anyhow::Result<Option<Tokenizer>> {
    if let ModelSource::Gguf(path) = source {
        let model = GgufModel::open(path)?;
        let json = tokenizer_json(&model.file).map_err(|error| model.error(error))?;
        return Ok(Some(Tokenizer::from_json(json.to_string().as_bytes())?));
    }
    let json = ModelFiles::of(source).read_if_present(TOKENIZER)?;
    json.map(|json| Ok(Tokenizer::from_json(&json)?)).transpose()
}

/// The path of a draft model, for the command line of a worker.
pub(crate) fn path(source: &ModelSource) -> anyhow::Result<String> {
    model_source::path(source)?.context("a draft model has a folder or a file")
}

const TOKENIZER: &str = "tokenizer.json";

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::flags::{Cli, Command};

    #[test]
    fn who_may_guess() {
        let folder = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
        let fixture = |name: &str| folder("tests/fixtures/models").join(name);
        let quantized = |name: &str| folder("tests/fixtures/quantized").join(name).join("model.gguf");
        #[rustfmt::skip]
        let rows = [
            ("a model of the same tokenizer", fixture("llama2"),              Ok(())),
            ("the model itself",              fixture("qwen3"),               Ok(())),
            ("a file of the same tokenizer",  quantized("gguf-q4_0"),         Ok(())),
            ("a file of another one",         quantized("gguf-plain"),        Err("has another tokenizer than")),
            ("a model of another one",        folder("models/demo/weights"),  Err("has another tokenizer than")),
            ("a folder without a model",      folder("docs"),                 Err("no config.json")),
            ("a folder that is not there",    folder("nothing/of/the/kind"),  Err("neither a folder")),
        ];
        let bars = MultiProgress::new();
        let serve = |arguments: &[&str]| match Cli::parse_from(arguments).command {
            Command::Serve(serve) => serve,
            other => panic!("serve was parsed as {other:?}"),
        };
        let model = fixture("qwen3");
        let model = model.to_str().unwrap();
        for (row, draft, expected) in rows {
            let config = serde_json::json!({ "method": "draft_model", "model": draft }).to_string();
            let flags = serve(&["tidemill", "serve", model, "--speculative-config", &config]);
            let resolved = model_source::resolve(&flags.model, &bars).unwrap();
            match (resolve(&flags.engine, &flags.model, &resolved, &bars), expected) {
                (Ok(Some(source)), Ok(())) => {
                    assert_eq!(folder_of(&source), draft.canonicalize().unwrap(), "{row}");
                }
                (Err(error), Err(words)) => assert!(format!("{error:#}").contains(words), "{row}: {error:#}"),
                (found, expected) => panic!("{row}: {found:?}, not {expected:?}"),
            }
        }
        let flags = serve(&["tidemill", "serve", model]);
        let resolved = model_source::resolve(&flags.model, &bars).unwrap();
        assert!(resolve(&flags.engine, &flags.model, &resolved, &bars).unwrap().is_none(), "nobody guesses");
    }

    fn folder_of(source: &ModelSource) -> std::path::PathBuf {
        std::path::PathBuf::from(path(source).unwrap()).canonicalize().unwrap()
    }
}
