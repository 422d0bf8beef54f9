// Renders a template as Ollama does (template.Execute with messages): the system texts joined, equal roles merged.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type work struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

func collated(given []message) (string, []message) {
	var system []string
	var messages []message
	for _, one := range given {
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if last := len(messages) - 1; last >= 0 && messages[last].Role == one.Role {
			messages[last].Content += "\n\n" + one.Content
		} else {
			messages = append(messages, one)
		}
	}
	return strings.Join(system, "\n\n"), messages
}

func main() {
	var works []work
	if err := json.NewDecoder(os.Stdin).Decode(&works); err != nil {
		panic(err)
	}
	written := [][]string{}
	for _, one := range works {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		texts := []string{}
		for _, conversation := range one.Conversations {
			system, messages := collated(conversation)
			var text strings.Builder
			values := map[string]any{"System": system, "Messages": messages, "Response": ""}
			if err := parsed.Execute(&text, values); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		written = append(written, texts)
	}
	if err := json.NewEncoder(os.Stdout).Encode(written); err != nil {
		panic(err)
	}
}
