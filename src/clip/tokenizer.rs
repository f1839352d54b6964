//! CLIP's byte-pair encoding, on the `tokenizers` crate.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::{Arc, LazyLock},
};

use serde::Deserialize;
use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer as Pipeline,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
};

use crate::{Error, Result, component::read};

/// The merges of OpenAI's CLIP, which every Stable Diffusion text encoder uses.
pub static CLIP_MERGES: &str = include_str!("merges.txt");
/// How CLIP ends a word.
const END_OF_WORD: &str = "</w>";
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Texts to token ids, as CLIP's own tokenizer and transformers' `CLIPTokenizer` make them.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    pipeline: Arc<Pipeline>,
    start: u32,
    end: u32,
    max_tokens: usize,
}

/// `tokenizer_config.json`, as far as it matters here. A token is a text or an object with one.
#[derive(Deserialize, Default)]
struct Config {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
    model_max_length: Option<f64>,
    /// By id: what is found in a text before it is split into words.
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, AddedToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object {
        content: String,
        #[serde(default)]
        normalized: bool,
    },
}

impl Token {
    fn or(token: Option<Self>, default: &str) -> AddedToken {
        match token {
            Some(Self::Text(content)) => AddedToken::from(content, true),
            Some(Self::Object {
                content,
                normalized,
            }) => AddedToken::from(content, true).normalized(normalized),
            None => AddedToken::from(default, true),
        }
    }
}

/// What `tokenizer.json` says of a BPE model.
#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct Model {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Tokens of a chunk of CLIP's, both ends included.
const CLIP_TOKENS: usize = 77;

impl Tokenizer {
    /// The tokenizer of OpenAI's CLIP, with a vocabulary of 49,408 tokens.
    pub fn clip() -> Self {
        static CLIP: LazyLock<Tokenizer> = LazyLock::new(|| {
            let merges =
                parse_merges(CLIP_MERGES).expect("the merges that this library brings along");
            let mut vocab = Vocab::default();
            let mut add = |token: String| {
                let id = u32::try_from(vocab.len()).expect("49,408 tokens");
                vocab.insert(token, id);
            };
            let alphabet = byte_alphabet();
            alphabet.iter().for_each(|c| add(c.to_string()));
            alphabet
                .iter()
                .for_each(|c| add(format!("{c}{END_OF_WORD}")));
            merges.iter().for_each(|(a, b)| add(format!("{a}{b}")));
            [START, END]
                .into_iter()
                .for_each(|token| add(token.to_owned()));
            Tokenizer::new(vocab, merges, Config::default(), "CLIP's tokenizer")
                .expect("the vocabulary that this library brings along")
        });
        CLIP.clone()
    }

    /// The tokenizer of a model folder: `vocab.json` and `merges.txt`, or `tokenizer.json`, and
    /// `tokenizer_config.json` where there is one.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
            serde_json::from_slice(&read(path)?).map_err(|e| {
                let expected = "the JSON of a CLIP tokenizer";
                Error::argument(path.display().to_string(), expected, e.to_string())
            })
        }
        let config = folder.join("tokenizer_config.json");
        let mut config = if config.exists() {
            json(&config)?
        } else {
            Config::default()
        };
        let (vocab, merges) = if folder.join("vocab.json").exists() {
            let path = folder.join("merges.txt");
            let text = String::from_utf8_lossy(&read(&path)?).into_owned();
            let merges = parse_merges(&text).ok_or_else(|| {
                let expected = "two tokens a line";
                Error::argument(path.display().to_string(), expected, "another line")
            })?;
            (json(&folder.join("vocab.json"))?, merges)
        } else {
            let path = folder.join("tokenizer.json");
            let File {
                model,
                added_tokens,
            } = json(&path)?;
            let added = added_tokens
                .into_iter()
                .map(|Added { id, token }| (id, token));
            config.added_tokens_decoder.extend(added);
            let merges = model.merges.into_iter().map(|merge| match merge {
                Merge::Pair(a, b) => Some((a, b)),
                Merge::Text(line) => parse_merge(&line),
            });
            let merges = merges.collect::<Option<_>>().ok_or_else(|| {
                let expected = "two tokens a merge";
                Error::argument(path.display().to_string(), expected, "another merge")
            })?;
            (model.vocab, merges)
        };
        let vocab = vocab.into_iter().collect();
        Self::new(vocab, merges, config, &folder.display().to_string())
    }

    fn new(vocab: Vocab, merges: Merges, config: Config, name: &str) -> Result<Self> {
        let refused = |found: String| Error::argument(name, "a CLIP tokenizer", found);
        let failed = |e: tokenizers::Error| refused(e.to_string());
        let start = Token::or(config.bos_token, START);
        let end = Token::or(config.eos_token, END);
        let unknown = Token::or(config.unk_token, END);
        let pad = Token::or(config.pad_token, END);
        let id_of = |token: &AddedToken| {
            let missing = || refused(format!("no token `{}` in the vocabulary", token.content));
            vocab.get(&token.content).copied().ok_or_else(missing)
        };
        let (start_id, end_id) = (id_of(&start)?, id_of(&end)?);
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token(unknown.content.clone())
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix(END_OF_WORD.to_owned())
            .build()
            .map_err(failed)?;
        let mut pipeline = Pipeline::new(model);
        let spaces = ReplacePattern::Regex(r"\s+".to_owned());
        let normalizers = Normalizers::new(vec![
            NFC.into(),
            Replace::new(spaces, " ").map_err(failed)?.into(),
            Lowercase.into(),
        ]);
        pipeline
            .with_normalizer(Some(normalizers))
            .map_err(failed)?;
        let words = SplitPattern::Regex(WORDS.to_owned());
        pipeline.with_pre_tokenizer(Some(PreTokenizers::new(vec![
            Split::new(words, SplitDelimiterBehavior::Removed, true)
                .map_err(failed)?
                .into(),
            ByteLevel::new(false, true, true).into(),
        ])));
        let mut added: Vec<AddedToken> = config.added_tokens_decoder.values().cloned().collect();
        for token in [start, end, unknown, pad] {
            if !added.iter().any(|known| known.content == token.content) {
                added.push(token);
            }
        }
        pipeline.add_tokens(added).map_err(failed)?;
        for (id, AddedToken { content, .. }) in config.added_tokens_decoder {
            if pipeline.token_to_id(&content) != Some(id) {
                return Err(refused(format!("id {id} for the added token `{content}`")));
            }
        }
        // Folders may say 1e30 for "any".
        let longest = config.model_max_length.filter(|n| (3.0..1e6).contains(n));
        Ok(Self {
            pipeline: Arc::new(pipeline),
            start: start_id,
            end: end_id,
            max_tokens: longest.map_or(CLIP_TOKENS, |n| n as usize),
        })
    }

    /// The ids of a text between those of start and end of text, not padded and not cut.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .pipeline
            .encode_fast(text, false)
            .map_err(|e| Error::argument("text", "a text", e.to_string()))?;
        let ids = encoding.get_ids().iter().copied();
        Ok([self.start]
            .into_iter()
            .chain(ids)
            .chain([self.end])
            .collect())
    }

    /// Tokens of a chunk, both ends included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The id of the end of text.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The number of tokens it knows.
    pub fn vocab_size(&self) -> usize {
        self.pipeline.get_vocab_size(true)
    }

    /// What speaks against a text as a rare identifier (paper, section 3.2): several tokens, or one of
    /// a frequent word. The later two tokens were merged, the rarer the result.
    pub fn why_not_rare(&self, text: &str) -> Result<Option<String>> {
        let ids = self.encode(text)?;
        let &[_, id, _] = ids.as_slice() else {
            return Ok(Some(format!("it is {} tokens, not one", ids.len() - 2)));
        };
        let size = self.vocab_size();
        // By rank: of CLIP's vocabulary the last fifth, from 39,526 on.
        let rare = id as usize >= size - size / 5;
        Ok((!rare).then(|| format!("its token is a frequent one, number {id} of {size}")))
    }
}

/// The character that stands for every byte, in the order of CLIP's vocabulary.
fn byte_alphabet() -> Vec<char> {
    let printable: Vec<u8> = (33..=126).chain(161..=172).chain(174..=255).collect();
    let known: HashSet<u8> = printable.iter().copied().collect();
    let others = (0..=255u8).filter(|byte| !known.contains(byte)).count() as u32;
    let others = (0..others).map(|i| char::from_u32(256 + i).expect("no surrogate"));
    printable
        .into_iter()
        .map(char::from)
        .chain(others)
        .collect()
}

/// The pairs of a `merges.txt`, whose first line may be a comment.
fn parse_merges(text: &str) -> Option<Merges> {
    let lines = text.lines().enumerate();
    lines
        .filter(|(i, line)| !(line.is_empty() || *i == 0 && line.contains("#version")))
        .map(|(_, line)| parse_merge(line))
        .collect()
}

fn parse_merge(line: &str) -> Option<(String, String)> {
    let (a, b) = line.split_once(' ')?;
    (!b.contains(' ')).then(|| (a.to_owned(), b.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids that OpenAI's own tokenizer gives.
    #[test]
    fn known_ids() {
        let clip = Tokenizer::clip();
        assert_eq!(clip.vocab_size(), 49_408);
        for (text, expected) in [
            ("", vec![]),
            ("a photo of a cat", vec![320, 1125, 539, 320, 2368]),
            ("A  Photo\nOF a CAT", vec![320, 1125, 539, 320, 2368]),
            ("sks", vec![48136]),
        ] {
            let ids = clip.encode(text).unwrap();
            assert_eq!(ids[1..ids.len() - 1], expected, "{text:?}");
            assert_eq!((ids[0], *ids.last().unwrap()), (49_406, 49_407));
        }
    }

    #[test]
    fn rare_is_one_late_token() {
        let clip = Tokenizer::clip();
        assert_eq!(clip.why_not_rare("sks").unwrap(), None);
        for (text, complaint) in [
            ("[V]", "3 tokens"),
            ("", "0 tokens"),
            ("cat", "number 2368"),
        ] {
            let found = clip.why_not_rare(text).unwrap().unwrap();
            assert!(found.contains(complaint), "{text}: {found}");
        }
    }
}
