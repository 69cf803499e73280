//! Pushing, against a stand-in for the hub on this machine.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

/// A hub that takes files.
#[derive(Default)]
struct Store {
    /// Repositories made: name and whether private.
    made: Vec<(String, bool)>,
    /// Large files that are there, by digest.
    large: BTreeMap<String, Vec<u8>>,
    /// Parts that have arrived, by digest and number.
    parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Files of the last commit: what they hold.
    committed: BTreeMap<String, Vec<u8>>,
    commits: usize,
    /// Bytes of a part; one piece where 0.
    part: usize,
    /// Statuses to answer requests with whose path holds this, one after the other.
    refuse: Vec<(&'static str, u16)>,
    /// The connection breaks off after this many bytes of the next upload.
    break_after: Option<usize>,
    /// Requests: method, path and whether the token was sent.
    requests: Vec<(String, String, bool)>,
}

struct Server {
    store: Arc<Mutex<Store>>,
    endpoint: String,
    folder: tempfile::TempDir,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let store = Arc::new(Mutex::new(Store::default()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (shared, own) = (store.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &shared, &own);
            }
        });
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        Self { store, endpoint, folder }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: self.folder.path().to_path_buf(),
            token: Some("secret".into()),
            offline: false,
            pause: Duration::from_millis(1),
            patience: Duration::from_secs(5),
        }
    }

    fn push(&self) -> Result<Pushed> {
        let push = Push { id: "me/model", public: false, message: "An adapter" };
        self.hub().push(self.folder.path(), push, &mut |_, _| ())
    }

    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    fn uploads(&self) -> Vec<String> {
        let requests = std::mem::take(&mut self.store().requests);
        requests.into_iter().filter(|(method, ..)| method == "PUT").map(|(_, path, _)| path).collect()
    }
}

fn answer(mut stream: TcpStream, store: &Mutex<Store>, endpoint: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default().to_string(), words.next().unwrap_or_default().to_string());
    let (mut length, mut authorised) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => authorised = value == "Bearer secret",
            _ => {}
        }
    }
    let broken = (method == "PUT").then(|| store.lock().unwrap().break_after.take()).flatten();
    if let Some(bytes) = broken {
        let mut part = vec![0; bytes.min(length)];
        reader.read_exact(&mut part)?;
        return Ok(());
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut store = store.lock().unwrap();
    store.requests.push((method.clone(), path.clone(), authorised));
    let mut reply = |status: u16, headers: &str, body: Value| {
        let body = body.to_string();
        let length = body.len();
        write!(stream, "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
    };
    if let Some(at) = store.refuse.iter().position(|(part, _)| path.contains(part)) {
        let (_, status) = store.refuse.remove(at);
        return reply(status, "", json!({"error": format!("refused with {status}")}));
    }
    let value: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    if method != "PUT" && !authorised {
        return reply(401, "", json!({"error": "who are you"}));
    }
    match (method.as_str(), &segments[..]) {
        ("POST", ["api", "repos", "create"]) => {
            let name = format!("{}/{}", value["organization"].as_str().unwrap(), value["name"].as_str().unwrap());
            if store.made.iter().any(|(made, _)| *made == name) {
                return reply(409, "", json!({"error": "you already created this model repo"}));
            }
            store.made.push((name, value["private"] == true));
            reply(200, "", json!({"url": "x"}))
        }
        ("GET", ["api", "models", "me", "model", "revision", "main"]) => reply(200, "", json!({})),
        ("POST", ["api", "models", "me", "model", "preupload", "main"]) => {
            let files = value["files"].as_array().unwrap().iter().map(|file| {
                let name = file["path"].as_str().unwrap();
                let mode = if name.ends_with(".safetensors") { "lfs" } else { "regular" };
                json!({"path": name, "uploadMode": mode, "shouldIgnore": name == "notes.tmp"})
            });
            reply(200, "", json!({"files": files.collect::<Vec<_>>()}))
        }
        ("POST", ["me", "model.git", "info", "lfs", "objects", "batch"]) => {
            let (digest, size) = (value["objects"][0]["oid"].clone(), value["objects"][0]["size"].as_u64().unwrap());
            let name = digest.as_str().unwrap();
            if store.large.contains_key(name) {
                return reply(200, "", json!({"objects": [{"oid": digest, "size": size}]}));
            }
            let verify = json!({"href": format!("{endpoint}/verify/{name}")});
            let upload = match store.part {
                0 => json!({"href": format!("{endpoint}/whole/{name}"), "header": {}}),
                part => {
                    let count = (size as usize).div_ceil(part);
                    let mut header = json!({"chunk_size": part.to_string()});
                    for number in 1..=count {
                        header[format!("{number:05}")] = json!(format!("{endpoint}/part/{name}/{number}"));
                    }
                    json!({"href": format!("{endpoint}/complete/{name}"), "header": header})
                }
            };
            reply(200, "", json!({"objects": [{"oid": digest, "actions": {"upload": upload, "verify": verify}}]}))
        }
        ("PUT", ["whole", digest]) => {
            assert!(!authorised, "the token goes to the hub alone");
            store.large.insert((*digest).into(), body);
            reply(200, "ETag: \"e\"\r\n", Value::Null)
        }
        ("PUT", ["part", digest, number]) => {
            store.parts.insert(((*digest).into(), number.parse().unwrap()), body);
            reply(200, &format!("ETag: \"{number}\"\r\n"), Value::Null)
        }
        ("POST", ["complete", digest]) => {
            let parts = value["parts"].as_array().unwrap();
            let numbers = parts.iter().map(|part| part["partNumber"].as_u64().unwrap() as usize);
            let whole = numbers.flat_map(|number| store.parts[&((*digest).to_string(), number)].clone()).collect();
            assert!(parts.iter().all(|part| part["etag"] == format!("\"{}\"", part["partNumber"])));
            store.large.insert((*digest).into(), whole);
            reply(200, "", json!({}))
        }
        ("POST", ["verify", digest]) => {
            let there =
                store.large.get(*digest).is_some_and(|bytes| bytes.len() as u64 == value["size"].as_u64().unwrap());
            reply(if there { 200 } else { 404 }, "", json!({}))
        }
        ("POST", ["api", "models", "me", "model", "commit", "main"]) => {
            let lines = String::from_utf8(body).unwrap();
            for line in lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
                let (value, name) = (&line["value"], line["value"]["path"].as_str().unwrap_or_default().to_string());
                let held = match line["key"].as_str().unwrap() {
                    "header" => continue,
                    "file" => BASE64_STANDARD.decode(value["content"].as_str().unwrap()).unwrap(),
                    "lfsFile" => store.large[value["oid"].as_str().unwrap()].clone(),
                    other => panic!("{other}"),
                };
                store.committed.insert(name, held);
            }
            store.commits += 1;
            reply(200, "", json!({"commitOid": "ab".repeat(20), "commitUrl": "x"}))
        }
        other => panic!("{other:?}"),
    }
}

fn large() -> Vec<u8> {
    (0..100_000u32).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_folder_becomes_one_commit_of_a_private_repository() {
    let large = large();
    let files: [(&str, &[u8]); 4] =
        [("adapter_model.safetensors", &large), ("README.md", b"words"), ("notes.tmp", b"mine"), (".lock", b"1")];
    let server = Server::start(&files);
    std::fs::create_dir(server.folder.path().join("state")).unwrap();
    let mut told = Vec::new();
    let push = Push { id: "me/model", public: false, message: "An adapter" };
    let pushed = server.hub().push(server.folder.path(), push, &mut |done, all| told.push((done, all))).unwrap();
    assert_eq!((pushed.sent, pushed.known), (100_005, 0));
    assert_eq!(pushed.address, format!("{}/me/model", server.endpoint));
    assert_eq!(told.last(), Some(&(100_005, 100_005)));
    let store = server.store();
    assert_eq!(store.made, [("me/model".to_string(), true)]);
    assert_eq!(store.committed.keys().collect::<Vec<_>>(), ["README.md", "adapter_model.safetensors"]);
    assert!(store.committed["adapter_model.safetensors"] == large && store.commits == 1);
    drop(store);
    // What the hub has is not sent again, though the repository is there already.
    server.uploads();
    let again = server.push().unwrap();
    assert_eq!((again.sent, again.known), (5, 100_000));
    assert_eq!(server.uploads(), [""; 0]);
}

#[test]
fn a_large_file_goes_in_parts_and_one_that_fails_goes_again() {
    let large = large();
    let server = Server::start(&[("model.safetensors", &large)]);
    server.store().part = 30_000;
    server.store().refuse = vec![("/2", 503)];
    server.push().unwrap();
    assert_eq!(server.store().committed["model.safetensors"], large);
    let numbers: Vec<String> = server.uploads().iter().map(|path| path.rsplit('/').next().unwrap().into()).collect();
    assert_eq!(numbers, ["1", "2", "2", "3", "4"]);
}

#[test]
fn an_interrupted_push_goes_on_with_the_file_it_was_at() {
    let (one, two) = (large(), vec![7u8; 50_000]);
    let server = Server::start(&[("a.safetensors", &one), ("b.safetensors", &two)]);
    // The connection breaks within the first file: it is sent anew, in the same run.
    server.store().break_after = Some(10_000);
    server.push().unwrap();
    assert_eq!(server.store().committed["a.safetensors"], one);

    let server = Server::start(&[("a.safetensors", &one), ("b.safetensors", &two)]);
    server.store().refuse = vec![("/commit/", 400)];
    let error = server.push().unwrap_err();
    assert!(error.exit_code() == 11 && error.to_string().contains("not sent twice"), "{error}");
    assert_eq!(server.store().commits, 0, "nothing is visible before the commit");
    server.uploads();
    assert_eq!(server.push().unwrap().sent, 0);
    assert_eq!((server.uploads().len(), server.store().committed.len()), (0, 2));
}

#[test]
fn refusals_say_the_way_out() {
    let server = Server::start(&[("a.safetensors", b"0123456789")]);
    for (path, status, times, part) in [
        ("/preupload/", 401, 1, "does not know this token (401)"),
        ("/commit/", 403, 1, "may write to this owner's"),
        ("/commit/", 409, 1, "changed meanwhile (409)"),
        ("/whole/", 413, 1, "instead of a merged model"),
        ("/batch", 500, 4, "the status 500"),
    ] {
        server.store().large.clear();
        server.store().refuse = vec![(path, status); times];
        let text = server.push().unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("me/model") && !text.contains("secret"), "{text}");
        assert!(server.store().refuse.is_empty());
    }
    // A token that may write, but not make repositories.
    server.store().refuse = vec![("/create", 403)];
    server.push().unwrap();
    // Three hiccups are survived.
    server.store().refuse = vec![("/commit/", 503), ("/commit/", 429), ("/commit/", 502)];
    server.push().unwrap();

    let refused = |hub: Hub, id: &str, folder: &Path| {
        let push = Push { id, public: true, message: "" };
        hub.push(folder, push, &mut |_, _| ()).unwrap_err().to_string()
    };
    let folder = server.folder.path();
    assert!(refused(Hub { token: None, ..server.hub() }, "me/model", folder).contains("HF_TOKEN"));
    assert!(refused(Hub { offline: true, ..server.hub() }, "me/model", folder).contains("unset it"));
    assert!(refused(server.hub(), "model", folder).contains("user/name"));
    assert!(refused(server.hub(), "../x/y", folder).contains("is not a model's name"));
    assert!(refused(server.hub(), "me/model", tempfile::tempdir().unwrap().path()).contains("holds no file"));
    let gone = Hub { endpoint: "http://127.0.0.1:9".into(), ..server.hub() };
    assert!(refused(gone, "me/model", folder).contains("check the network"));
}

#[test]
fn the_token_stays_with_the_hub() {
    let server = Server::start(&[("a.safetensors", b"0123456789")]);
    server.store().part = 4;
    server.push().unwrap();
    let requests = std::mem::take(&mut server.store().requests);
    let with: BTreeSet<bool> =
        requests.iter().filter(|(method, ..)| method == "PUT").map(|(.., token)| *token).collect();
    assert_eq!(with, BTreeSet::from([false]));
}
