//! From MODEL on the command line to files: a folder, a GGUF file, a model of the Hugging Face hub, or the demo model.
//!
//! The hub's own client does the downloading and keeps its own cache (`HF_HOME`), so that models are shared with other
//! programs. Only what is served is fetched: configuration, tokenizer, chat template and safetensors, or one GGUF file with its parts.

mod gguf_choice;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tidemill_engine::handle::{EmbeddedFile, ModelSource};

use crate::flags::ModelFlags;
use gguf_choice::{choose, files_of_choice, is_gguf, shown};

/// A model whose files are here.
#[derive(Clone, Debug)]
pub(crate) struct ResolvedModel {
    /// Its files.
    pub(crate) source: ModelSource,
    /// Name in the API, unless flags say otherwise.
    pub(crate) name: String,
}

/// Why a model cannot be had, in words that say what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelSourceError {
    /// A path that is none.
    #[error(
        "`{0}` is neither a folder with a config.json nor a GGUF file nor a model id of the form owner/name or \
         owner/name:file.gguf"
    )]
    Nothing(String),
    /// A folder without a model in it.
    #[error("{0} has no config.json: give the folder of a model in the Hugging Face format, or a GGUF file")]
    NoModel(PathBuf),
    /// Something that cannot be looked at.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Several GGUF files, or none of those that are there.
    #[error("{place} has no single GGUF file {wanted}: name one of {found}")]
    WhichGguf { place: String, wanted: String, found: String },
    /// The hub does not know it.
    #[error(
        "the hub has no model `{id}` at revision `{revision}`: check the spelling, or set HF_TOKEN if it is private"
    )]
    Unknown { id: String, revision: String },
    /// The hub tells strangers alike of what does not exist and of what is private or gated.
    #[error(
        "the hub does not show `{id}` to everybody: check the spelling; if it is private or gated, accept its terms on the \
         hub's page and set HF_TOKEN to a token of an account that may read it"
    )]
    Hidden { id: String },
    /// The hub does not give it to this account.
    #[error(
        "`{id}` is gated: accept its terms on the hub's page and set HF_TOKEN to a token of that account"
    )]
    Gated { id: String },
    /// Nothing may be downloaded, and it is not there.
    #[error("`{id}` is not in the cache ({}), and offline mode forbids to download it", cache.display())]
    Offline { id: String, cache: PathBuf },
    /// It has no weights in the format that is read.
    #[error("`{id}` has no *.safetensors files; convert it, or choose another revision")]
    NoWeights { id: String },
    /// It has GGUF files, of which one has to be named.
    #[error("`{id}` has GGUF files: name one, as in {id}:{first}; there are {found}")]
    OnlyGguf { id: String, first: String, found: String },
    /// Anything else that went wrong on the way.
    #[error("cannot download `{id}`: {reason}; a model that is in the cache is served with --offline")]
    Download { id: String, reason: String },
}

/// Finds the model's files, and fetches them if they are not here. Blocks; shows a bar for each file.
///
/// # Errors
///
/// [`ModelSourceError`] says what to do.
pub(crate) fn resolve(flags: &ModelFlags, bars: &MultiProgress) -> Result<ResolvedModel, ModelSourceError> {
    let Some(name) = flags.name() else {
        return Ok(ResolvedModel { source: ModelSource::Embedded(DEMO), name: DEMO_NAME.to_owned() });
    };
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(ResolvedModel { source: in_folder(path)?, name: name.to_owned() });
    }
    if path.is_file() {
        return Ok(ResolvedModel { source: ModelSource::Gguf(path.to_owned()), name: name.to_owned() });
    }
    let (id, file) = name.split_once(':').map_or((name, None), |(id, file)| (id, Some(file)));
    if !is_hub_id(id) || file.is_some_and(str::is_empty) {
        return Err(ModelSourceError::Nothing(name.to_owned()));
    }
    let hub = Hub::from_environment(flags.offline);
    let source = match file {
        None => ModelSource::Folder(hub.folder(id, &flags.revision, bars)?),
        Some(wanted) => ModelSource::Gguf(hub.gguf(id, wanted, &flags.revision, bars)?),
    };
    Ok(ResolvedModel { source, name: name.to_owned() })
}

/// The path of a model for the command line of a worker; `None` for the one in the binary.
pub(crate) fn path(source: &ModelSource) -> anyhow::Result<Option<String>> {
    let path = match source {
        ModelSource::Folder(folder) => folder.canonicalize()?,
        // Not the file that a link in the hub's cache leads to: its name says nothing.
        ModelSource::Gguf(file) => std::path::absolute(file)?,
        ModelSource::Embedded(_) => return Ok(None),
    };
    let path = path.into_os_string().into_string();
    path.map(Some).map_err(|_| anyhow::anyhow!("the model's path is not UTF-8"))
}

/// The model in a folder: in the format of transformers, or the one GGUF file.
fn in_folder(folder: &Path) -> Result<ModelSource, ModelSourceError> {
    if folder.join(CONFIG).is_file() {
        return Ok(ModelSource::Folder(folder.to_owned()));
    }
    let files: Vec<String> = names_in(folder)?.into_iter().filter(|name| is_gguf(name)).collect();
    match &files[..] {
        [] => Err(ModelSourceError::NoModel(folder.to_owned())),
        [only] => Ok(ModelSource::Gguf(folder.join(only))),
        _ => {
            let (place, found) = (folder.display().to_string(), shown(&files));
            Err(ModelSourceError::WhichGguf { place, wanted: String::new(), found })
        }
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>, ModelSourceError> {
    let error = |source| ModelSourceError::Read { path: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(error)?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| Ok(entry.map_err(error)?.file_name());
    let names: Vec<_> = entries.map(name).collect::<Result<_, _>>()?;
    let mut names: Vec<String> = names.into_iter().filter_map(|name| name.into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// The files in a folder and those within it, by their paths from the first one, with `/`.
fn names_below(folder: &Path, before: &str, found: &mut Vec<String>) -> Result<(), ModelSourceError> {
    for name in names_in(folder)? {
        let path = format!("{before}{name}");
        if folder.join(&name).is_dir() {
            names_below(&folder.join(&name), &format!("{path}/"), found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// The hub and its cache.
#[derive(Debug)]
struct Hub {
    cache: Cache,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    #[expect(
        clippy::disallowed_methods,
        reason = "HF_* variables are the hub's convention, not flags of ours"
    )]
    fn from_environment(offline: bool) -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let forbidden =
            set("HF_HUB_OFFLINE").is_some_and(|value| !["0", "false", "no", "off"].contains(&value.as_str()));
        let cache = Cache::from_env();
        Self {
            endpoint: set("HF_ENDPOINT"),
            token: set("HF_TOKEN").or_else(|| cache.token()),
            cache,
            offline: offline || forbidden,
        }
    }

    /// The folder with the model's files.
    fn folder(&self, id: &str, revision: &str, bars: &MultiProgress) -> Result<PathBuf, ModelSourceError> {
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        let cached = self.cache.repo(repo.clone());
        if self.offline {
            let config = cached.get(CONFIG).ok_or_else(|| ModelSourceError::Offline {
                id: id.to_owned(),
                cache: self.cache.path().clone(),
            })?;
            return Ok(parent(&config));
        }
        let api = self.api(repo).map_err(|error| explain(id, revision, &error))?;
        let files = files_of(&api).map_err(|error| explain(id, revision, &error))?;
        let mut wanted: Vec<String> = files.iter().filter(|name| is_needed(name)).cloned().collect();
        if !wanted.iter().any(|name| name.ends_with(".safetensors")) {
            return Err(no_weights(id, files));
        }
        // The configuration comes last, so that a folder that has it has everything else too.
        wanted.sort_by_key(|name| (name == CONFIG, name.clone()));
        let mut last = PathBuf::new();
        for name in wanted {
            last = match cached.get(&name) {
                Some(path) => path,
                None => download(&api, id, &name, bars).map_err(|error| explain(id, revision, &error))?,
            };
        }
        Ok(parent(&last))
    }

    /// A GGUF file of a model, by its name or by what its weights are quantised to.
    fn gguf(
        &self,
        id: &str,
        wanted: &str,
        revision: &str,
        bars: &MultiProgress,
    ) -> Result<PathBuf, ModelSourceError> {
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        let cached = self.cache.repo(repo.clone());
        let unclear = |files: Vec<String>| ModelSourceError::WhichGguf {
            place: format!("`{id}`"),
            wanted: format!("`{wanted}`"),
            found: shown(&files),
        };
        if self.offline {
            let offline = || ModelSourceError::Offline {
                id: format!("{id}:{wanted}"),
                cache: self.cache.path().clone(),
            };
            let references = self.cache.path().join(repo.folder_name()).join("refs");
            let commit = std::fs::read_to_string(references.join(revision)).map_err(|_| offline())?;
            let snapshot = cached.pointer_path(commit.trim());
            let mut names = Vec::new();
            names_below(&snapshot, "", &mut names)?;
            let name = choose(&names, wanted).map_err(|_| offline())?;
            // A download that was broken off leaves some parts out.
            if !files_of_choice(&name).iter().all(|part| names.contains(part)) {
                return Err(offline());
            }
            return Ok(snapshot.join(name));
        }
        let api = self.api(repo).map_err(|error| explain(id, revision, &error))?;
        let files = files_of(&api).map_err(|error| explain(id, revision, &error))?;
        let name = choose(&files, wanted).map_err(unclear)?;
        let file = |name: &String| match cached.get(name) {
            Some(path) => Ok(path),
            None => download(&api, id, name, bars).map_err(|error| explain(id, revision, &error)),
        };
        let paths: Vec<PathBuf> = files_of_choice(&name).iter().map(file).collect::<Result<_, _>>()?;
        Ok(paths.into_iter().next().expect("a model has a first file"))
    }

    fn api(&self, repo: Repo) -> Result<ApiRepo, ApiError> {
        let mut builder =
            ApiBuilder::from_cache(self.cache.clone()).with_progress(false).with_token(self.token.clone());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        Ok(builder.build()?.repo(repo))
    }
}

fn files_of(api: &ApiRepo) -> Result<Vec<String>, ApiError> {
    Ok(api.info()?.siblings.into_iter().map(|file| file.rfilename).collect())
}

fn download(api: &ApiRepo, id: &str, name: &str, bars: &MultiProgress) -> Result<PathBuf, ApiError> {
    api.download_with_progress(name, Bar::new(id, name, bars))
}

fn no_weights(id: &str, files: Vec<String>) -> ModelSourceError {
    let files: Vec<String> = files.into_iter().filter(|name| is_gguf(name)).collect();
    match files.first() {
        None => ModelSourceError::NoWeights { id: id.to_owned() },
        Some(first) => {
            ModelSourceError::OnlyGguf { id: id.to_owned(), first: first.clone(), found: shown(&files) }
        }
    }
}

/// One file's progress: a bar on a terminal, two log lines otherwise.
#[derive(Debug)]
struct Bar {
    bar: ProgressBar,
    label: String,
}

impl Bar {
    fn new(id: &str, file: &str, bars: &MultiProgress) -> Self {
        let bar = bars.add(ProgressBar::new(0));
        let style =
            ProgressStyle::with_template("{msg:<32!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
                .expect("the template is well formed");
        bar.set_style(style);
        bar.set_message(file.to_owned());
        Self { bar, label: format!("{id}/{file}") }
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        self.bar.set_length(size as u64);
        if !std::io::stderr().is_terminal() {
            tracing::info!(file = %self.label, bytes = size, "downloading");
        }
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
        if !std::io::stderr().is_terminal() {
            tracing::info!(file = %self.label, "downloaded");
        }
    }
}

fn explain(id: &str, revision: &str, error: &ApiError) -> ModelSourceError {
    let reason = error.to_string();
    // The client's HTTP library is not ours to name; its message is stable and tested below against a real server.
    let has_status = |status: u16| reason.contains(&format!("status: {status}"));
    if has_status(404) {
        ModelSourceError::Unknown { id: id.to_owned(), revision: revision.to_owned() }
    } else if has_status(401) {
        ModelSourceError::Hidden { id: id.to_owned() }
    } else if has_status(403) {
        ModelSourceError::Gated { id: id.to_owned() }
    } else {
        ModelSourceError::Download { id: id.to_owned(), reason }
    }
}

fn is_hub_id(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|it| it.is_ascii_alphanumeric() || "-_.".contains(it))
    };
    matches!(name.split('/').collect::<Vec<_>>()[..], [owner, name] if is_part(owner) && is_part(name))
}

fn is_needed(name: &str) -> bool {
    let listed = [
        CONFIG,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors.index.json",
    ];
    // Files in folders are other formats or training leftovers.
    listed.contains(&name) || (name.ends_with(".safetensors") && !name.contains('/'))
}

fn parent(file: &Path) -> PathBuf {
    file.parent().expect("a cached file lies in its snapshot's folder").to_owned()
}

const CONFIG: &str = "config.json";

/// Name of the demo model in the API.
pub(crate) const DEMO_NAME: &str = "tidemill-demo";

macro_rules! demo_files {
    ($($name:literal),* $(,)?) => {
        &[$(EmbeddedFile { name: $name, bytes: include_bytes!(concat!("../../models/demo/weights/", $name)) }),*]
    };
}

/// The demo model, a folder in the binary.
const DEMO: &[EmbeddedFile] = demo_files!(
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_model_is_fetched_once_and_then_found_offline() {
        let files = BTreeMap::from([
            ("config.json", "{}"),
            ("model.safetensors", "weights"),
            ("tokenizer.json", "{}"),
            ("m-Q4_K_M.gguf", "not wanted"),
            ("m-Q8_0.gguf", "GGUF"),
            ("onnx/model.safetensors", "not wanted"),
            ("README.md", "not wanted"),
        ]);
        let (endpoint, requests) = serve_hub(files);
        let home = tempfile::tempdir().expect("a temporary folder");
        let hub = |offline| Hub {
            cache: Cache::new(home.path().to_owned()),
            endpoint: Some(endpoint.clone()),
            token: Some("secret".into()),
            offline,
        };
        let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let folder = |hub: &Hub, id: &str| hub.folder(id, "main", &bars);

        assert!(matches!(folder(&hub(true), "o/m"), Err(ModelSourceError::Offline { .. })));
        let found = folder(&hub(false), "o/m").expect("the hub has it");
        let mut names: Vec<String> = std::fs::read_dir(&found)
            .expect("a folder")
            .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(std::fs::read_to_string(found.join("model.safetensors")).expect("readable"), "weights");
        assert!(requests.lock().expect("whole").iter().all(|request| request.contains("Bearer secret")));

        assert_eq!(folder(&hub(true), "o/m").expect("it is in the cache"), found);
        let before = requests.lock().expect("whole").len();
        folder(&hub(false), "o/m").expect("nothing but the list of files is asked for again");
        assert_eq!(requests.lock().expect("whole").len(), before + 1);

        let gguf = |hub: &Hub, wanted: &str| hub.gguf("o/m", wanted, "main", &bars);
        assert!(matches!(gguf(&hub(true), "Q8_0"), Err(ModelSourceError::Offline { .. })));
        let error = gguf(&hub(false), "Q2_K").expect_err("there is none").to_string();
        assert!(
            error.contains("`o/m` has no single GGUF file `Q2_K`: name one of m-Q4_K_M.gguf, m-Q8_0.gguf"),
            "{error}"
        );
        let file = gguf(&hub(false), "q8_0").expect("the hub has it");
        assert!(file.ends_with("m-Q8_0.gguf"), "{}", file.display());
        for wanted in ["Q8_0", "m-Q8_0.gguf"] {
            assert_eq!(gguf(&hub(true), wanted).expect("it is in the cache"), file);
        }
        assert!(matches!(gguf(&hub(true), "Q4_K_M"), Err(ModelSourceError::Offline { .. })));

        assert!(matches!(folder(&hub(false), "o/missing"), Err(ModelSourceError::Unknown { .. })));
        assert!(matches!(folder(&hub(false), "o/gated"), Err(ModelSourceError::Gated { .. })));
        assert!(matches!(folder(&hub(false), "o/private"), Err(ModelSourceError::Hidden { .. })));
        let nobody = Hub { endpoint: Some("http://127.0.0.1:9".into()), ..hub(false) };
        assert!(matches!(folder(&nobody, "o/other"), Err(ModelSourceError::Download { .. })));
    }

    #[test]
    fn a_folder_may_have_one_gguf_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str| std::fs::write(folder.path().join(name), "GGUF").expect("it can be written");
        assert!(matches!(in_folder(folder.path()), Err(ModelSourceError::NoModel(_))));
        write("notes.txt");
        write("one.gguf");
        assert!(
            matches!(in_folder(folder.path()), Ok(ModelSource::Gguf(path)) if path.ends_with("one.gguf"))
        );
        for part in ["one-00002-of-00002.gguf", "notes-00003-of-00003.gguf"] {
            write(part);
            assert!(in_folder(folder.path()).is_ok(), "a later part is no model of its own");
        }
        write("Two.GGUF");
        let error = in_folder(folder.path()).expect_err("there are two").to_string();
        assert!(error.contains("name one of Two.GGUF, one.gguf"), "{error}");
        write(CONFIG);
        assert!(matches!(in_folder(folder.path()), Ok(ModelSource::Folder(_))));
    }

    #[test]
    fn a_model_of_gguf_files_says_how_to_name_one() {
        let files = BTreeMap::from([("README.md", ""), ("m-Q4_0.gguf", "GGUF")]);
        let (endpoint, _) = serve_hub(files);
        let home = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(home.path().to_owned());
        let hub = Hub { cache, endpoint: Some(endpoint), token: None, offline: false };
        let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let error = hub.folder("o/m", "main", &bars).expect_err("there are no safetensors").to_string();
        assert!(error.contains("name one, as in o/m:m-Q4_0.gguf"), "{error}");
    }

    #[test]
    fn all_parts_of_a_gguf_file_are_fetched() {
        let parts = ["q/m-Q8_0-00001-of-00002.gguf", "q/m-Q8_0-00002-of-00002.gguf"];
        let files =
            BTreeMap::from([(parts[0], "GGUF first"), (parts[1], "GGUF second"), ("m-Q4_0.gguf", "GGUF")]);
        let (endpoint, _) = serve_hub(files);
        let home = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(home.path().to_owned());
        let hub =
            |offline| Hub { cache: cache.clone(), endpoint: Some(endpoint.clone()), token: None, offline };
        let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let first = hub(false).gguf("o/m", "q8_0", "main", &bars).expect("the hub has it");
        assert!(first.ends_with(parts[0]), "{}", first.display());
        let second = first.with_file_name("m-Q8_0-00002-of-00002.gguf");
        assert_eq!(std::fs::read_to_string(&second).expect("it was fetched too"), "GGUF second");
        assert_eq!(hub(true).gguf("o/m", "Q8_0", "main", &bars).expect("it is in the cache"), first);
        std::fs::remove_file(second).expect("it can be removed");
        let error = hub(true).gguf("o/m", "Q8_0", "main", &bars);
        assert!(matches!(error, Err(ModelSourceError::Offline { .. })), "a part is missing");
    }

    #[test]
    fn names_are_told_apart() {
        #[rustfmt::skip]
        let rows = [
            ("an id",                   "Qwen/Qwen3-0.6B",  true),
            ("a path",                  "./model",          false),
            ("a deeper path",           "a/b/c",            false),
            ("an absolute path",        "/models/x",        false),
            ("one word",                "model",            false),
            ("a path above",            "../model",         false),
        ];
        for (row, name, expected) in rows {
            assert_eq!(is_hub_id(name), expected, "{row}");
        }
    }

    /// A hub with one model, `o/m`, one that is gated and one that is private. Returns its address and the requests that it has seen.
    fn serve_hub(files: BTreeMap<&'static str, &'static str>) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    request.push(byte[0]);
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                let reply = reply(&request, &files);
                seen.lock().expect("whole").push(request);
                let _ = stream.write_all(&reply);
            }
        });
        (endpoint, requests)
    }

    fn reply(request: &str, files: &BTreeMap<&'static str, &'static str>) -> Vec<u8> {
        let path = request.split(' ').nth(1).unwrap_or("");
        let range = request
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
        let (status, body) = if path.contains("o/gated") {
            ("403 Forbidden", String::new())
        } else if path.contains("o/private") {
            ("401 Unauthorized", String::new())
        } else if path.starts_with("/api/models/o/m/") || path == "/api/models/o/m" {
            let siblings: Vec<String> =
                files.keys().map(|name| format!("{{\"rfilename\": \"{name}\"}}")).collect();
            ("200 OK", format!("{{\"sha\": \"abc\", \"siblings\": [{}]}}", siblings.join(",")))
        } else if let Some(body) = path.strip_prefix("/o/m/resolve/main/").and_then(|name| files.get(name)) {
            ("206 Partial Content", (*body).to_owned())
        } else {
            ("404 Not Found", String::new())
        };
        let total = body.len();
        let (first, last) = range
            .as_deref()
            .and_then(|range| range.split_once('-'))
            .and_then(|(first, last)| {
                Some((first.parse().ok()?, last.parse().unwrap_or(total).min(total.saturating_sub(1))))
            })
            .unwrap_or((0_usize, total.saturating_sub(1)));
        let part = body.as_bytes().get(first..(last + 1).min(total)).unwrap_or_default();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{total}\r\nETag: \"{total}-{path}\"\r\nX-Repo-Commit: abc\r\nConnection: close\r\n\r\n",
            part.len(),
            path = path.replace('/', "_"),
        );
        [head.as_bytes(), part].concat()
    }
}
