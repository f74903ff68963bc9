//! Credentials as sent by a CRI client, and parsing of a registry's authentication challenge (RFC
//! 9110, section 11; distribution-spec token authentication).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Fields of the CRI's AuthConfig; an empty string means unset.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    pub username: String,
    pub password: String,
    /// `base64(username:password)`, used if there is no user name.
    pub auth: String,
    /// Refresh token, exchanged for an access token at the registry's token service.
    pub identity_token: String,
    /// Bearer token sent to the registry.
    pub registry_token: String,
    /// If set, the credentials are used for this registry only.
    pub server_address: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// The form in which an [`Auth`] applies to one host.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    #[default]
    None,
    Basic {
        username: String,
        password: String,
    },
    Identity(String),
    Bearer(String),
}

impl Auth {
    /// The credentials for a host; none if they are limited to another one. If several forms are
    /// set, containerd's order applies, and a registry token, which containerd ignores, comes last.
    pub fn credentials(&self, host: &str) -> Credentials {
        if !self.server_address.is_empty() && host_of(&self.server_address) != host_of(host) {
            return Credentials::None;
        }
        let identity = || Credentials::Identity(self.identity_token.clone());
        let basic = |username: &str, password: &str| Credentials::Basic {
            username: username.into(),
            password: password.into(),
        };
        // With an identity token, the user name is the placeholder `<token>`.
        if !self.username.is_empty()
            && (!self.password.is_empty() || self.identity_token.is_empty())
        {
            return basic(&self.username, &self.password);
        }
        if !self.identity_token.is_empty() {
            return identity();
        }
        if !self.auth.is_empty() {
            let decoded = STANDARD.decode(self.auth.trim()).ok();
            let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
            if let Some((username, password)) = decoded.as_deref().and_then(|d| d.split_once(':')) {
                return basic(username, password.trim_matches('\0'));
            }
        }
        match self.registry_token.as_str() {
            "" => Credentials::None,
            token => Credentials::Bearer(token.into()),
        }
    }

    /// Whether the `auth` field would be used and is malformed. Reported as an error: a pull
    /// without credentials would fail with a misleading message.
    pub fn is_malformed(&self) -> bool {
        !self.auth.is_empty()
            && self.username.is_empty()
            && self.identity_token.is_empty()
            && !STANDARD
                .decode(self.auth.trim())
                .is_ok_and(|bytes| std::str::from_utf8(&bytes).is_ok() && bytes.contains(&b':'))
    }
}

/// A request to a token service (distribution's token and oauth2 specifications).
pub struct Grant {
    pub post: bool,
    pub parameters: Vec<(&'static str, String)>,
    pub basic: Option<(String, String)>,
}

impl Credentials {
    /// The grants to try, in order; at least one.
    pub fn grants(&self, service: &str, scope: &str) -> Vec<Grant> {
        let get = |basic| {
            let mut parameters = vec![("scope", scope.to_owned())];
            if !service.is_empty() {
                parameters.insert(0, ("service", service.to_owned()));
            }
            Grant { post: false, parameters, basic }
        };
        let post = |grant_type: &str, secrets: Vec<(&'static str, String)>| {
            let mut parameters = vec![
                ("grant_type", grant_type.to_owned()),
                ("client_id", "nacelle".to_owned()),
                ("service", service.to_owned()),
                ("scope", scope.to_owned()),
            ];
            parameters.extend(secrets);
            Grant { post: true, parameters, basic: None }
        };
        match self {
            Self::None | Self::Bearer(_) => vec![get(None)],
            Self::Basic { username, password } => vec![
                get(Some((username.clone(), password.clone()))),
                post(
                    "password",
                    vec![("username", username.clone()), ("password", password.clone())],
                ),
            ],
            Self::Identity(token) => vec![
                post("refresh_token", vec![("refresh_token", token.clone())]),
                get(Some((String::new(), token.clone()))),
            ],
        }
    }
}

/// The host of an address; `https://index.docker.io/v1/` and `docker.io` are equivalent.
fn host_of(address: &str) -> &str {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = address.split('/').next().unwrap_or(address);
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

/// A `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (key, value) in parameters(rest) {
            match key.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Self::Bearer { realm: realm?, service, scope })
    }
}

/// Parses comma-separated `key=value` and `key="value"`; quotes may contain commas.
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_owned();
        let mut value = String::new();
        text = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut chars = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, c)) = chars.next() {
                    match c {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(chars.next().map(|(_, c)| c)),
                        c => value.push(c),
                    }
                }
                &quoted[end..]
            }
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                value.push_str(rest[..end].trim());
                &rest[end..]
            }
        };
        parameters.push((key, value));
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_parsed_with_commas_in_quotes() {
        let header = r#"Bearer realm="https://auth.x/token",service="reg \"a\"",scope="repository:a/b:pull,push""#;
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(header) else {
            panic!("not parsed")
        };
        assert_eq!(realm, "https://auth.x/token");
        assert_eq!(service.unwrap(), "reg \"a\"");
        assert_eq!(scope.unwrap(), "repository:a/b:pull,push");
        assert_eq!(Challenge::parse("Basic realm=x"), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer scope=x"), None);
        assert_eq!(
            Challenge::parse("Bearer realm=\"unclosed"),
            Some(Challenge::Bearer { realm: "unclosed".into(), service: None, scope: None })
        );
        assert_eq!(Challenge::parse("Negotiate abc"), None);
    }

    #[test]
    fn credentials_stay_with_their_registry() {
        let auth = Auth {
            username: "u".into(),
            password: "p".into(),
            server_address: "https://index.docker.io/v1/".into(),
            ..Auth::default()
        };
        assert!(auth.credentials("docker.io") != Credentials::None);
        assert!(auth.credentials("evil.example") == Credentials::None);
    }

    #[test]
    fn the_auth_field_holds_user_and_password() {
        let auth = Auth { auth: STANDARD.encode("user:pa:ss"), ..Auth::default() };
        let expected = Credentials::Basic { username: "user".into(), password: "pa:ss".into() };
        assert!(auth.credentials("x") == expected);
        assert!(!auth.is_malformed());
        for malformed in ["%%%".to_owned(), STANDARD.encode("no colon"), STANDARD.encode([0xff])] {
            let auth = Auth { auth: malformed, ..Auth::default() };
            assert!(auth.credentials("x") == Credentials::None);
            assert!(auth.is_malformed());
        }
    }

    #[test]
    fn the_first_of_several_forms_is_used() {
        let identity = Credentials::Identity("id".into());
        let basic = Credentials::Basic { username: "u".into(), password: "p".into() };
        let mut auth = Auth {
            username: "u".into(),
            password: "p".into(),
            auth: STANDARD.encode("a:b\0"),
            identity_token: "id".into(),
            registry_token: "reg".into(),
            ..Auth::default()
        };
        assert!(auth.credentials("x") == basic);
        auth.password.clear();
        assert!(auth.credentials("x") == identity, "a user without a password is a placeholder");
        auth.username.clear();
        assert!(auth.credentials("x") == identity);
        auth.identity_token.clear();
        let decoded = Credentials::Basic { username: "a".into(), password: "b".into() };
        assert!(auth.credentials("x") == decoded);
        auth.auth.clear();
        assert!(auth.credentials("x") == Credentials::Bearer("reg".into()));
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth =
            Auth { password: "hunter2".into(), registry_token: "tok".into(), ..Auth::default() };
        let text = format!("{auth:?}");
        assert!(!text.contains("hunter2") && !text.contains("tok"));
    }
}
